"""Plugins that every test of the workspace can use."""

pytest_plugins = ["support.golden"]
