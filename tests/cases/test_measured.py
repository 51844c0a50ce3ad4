"""The measured cases for a clone: `pytest -m gpu --models gpt2,olmo-1b` finds them here."""

from harness.cases.test_measured import test_measured

__all__ = ["test_measured"]
