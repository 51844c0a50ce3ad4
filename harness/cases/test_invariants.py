"""Every invariant is one test: measured in its own process, and failed where it neither holds nor is a known fault.

They run where they are asked for (`-m invariant`, `-k invariant`, or this file named), on a layer and on the tiny
models, for the methods that `--methods` names.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness.core.records import Case, Row


@pytest.mark.invariant
def test_invariant(harness_case: Case, harness_check: Callable[[Case], Row]) -> None:
    """Run one check and hold it against its limit and the known faults."""
    harness_check(harness_case)
