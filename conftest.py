"""Plugins that every test of the workspace can use."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # waiting threads sleep: spinning ruins the speed of a busy machine
if "PYTEST_XDIST_WORKER" in os.environ:  # as many threads as workers, not their product
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["support.golden", "support.hub"]
