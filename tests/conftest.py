"""For every test of the harness and of its studies: hypothesis without deadlines, since shared machines stall.

The same examples every time, so that a commit passes everywhere or nowhere; with HARNESS_FUZZ (the fuzzers at length)
new ones. Tests that take minutes on a slow processor and whose part a quicker one shows too are run with HARNESS_LONG
(`tox run -e long`).
"""

import os

import pytest
from hypothesis import settings

for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):  # sessions of these tests are no jobs of a workflow's
    os.environ.pop(name, None)

settings.register_profile("steady", deadline=None, derandomize="HARNESS_FUZZ" not in os.environ)
settings.load_profile("steady")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: minutes on a slow processor; run with HARNESS_LONG set")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "HARNESS_LONG" in os.environ:
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="long: tox run -e long"))
