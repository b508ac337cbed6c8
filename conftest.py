"""Plugins that every test of the workspace can use."""

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # waiting threads sleep: spinning ruins the speed of a busy machine
if "PYTEST_XDIST_WORKER" in os.environ:  # as many threads as workers, not their product
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, and no time limit for one: `--hypothesis-profile default` draws new ones.
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

pytest_plugins = ["support.golden", "support.hub"]
