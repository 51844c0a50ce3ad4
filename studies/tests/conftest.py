"""The same rules as for the package's own tests: what is long, and hypothesis without deadlines."""

from tests.conftest import pytest_collection_modifyitems, pytest_configure

__all__ = ["pytest_collection_modifyitems", "pytest_configure"]
