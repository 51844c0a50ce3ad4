"""The published figures for a clone: `pytest -m published` finds them here."""

from harness.cases.test_published import pytest_generate_tests, test_published

__all__ = ["pytest_generate_tests", "test_published"]
