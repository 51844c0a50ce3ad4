"""Every planned case is one test: measure, judge, and fail only where the verdict says so."""

from __future__ import annotations

from collections.abc import Callable

from harness.core.records import Case, Row


def test_measured(harness_case: Case, harness_check: Callable[[Case], Row]) -> None:
    """Measure one model under one method by one metric and hold it against reference and baseline."""
    harness_check(harness_case)
