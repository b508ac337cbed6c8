"""Plugins that every test of the workspace can use."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # waiting threads sleep: spinning ruins the speed of a busy machine

pytest_plugins = ["support.golden", "support.hub"]
