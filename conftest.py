"""Loads the harness's plugin for a clone that is not installed; an installed one has loaded it already."""

pytest_plugins = ("harness.plugin",)
