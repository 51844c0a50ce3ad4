"""Loads the harness's plugin for a clone that is not installed, and pytest's own for tests that run sessions."""

pytest_plugins = ("harness.plugin", "pytester")
