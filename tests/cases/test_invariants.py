"""The invariants for a clone: `pytest -m invariant` finds them here."""

from harness.cases.test_invariants import test_invariant

__all__ = ["test_invariant"]
