"""Behaviour compared between two sides."""

from __future__ import annotations

import math

import pytest

from harness.core.records import Case, Row, Verdict
from harness.judge.two_reports import compare

CASE = Case("layer", "bnb-nf4", "", "", "invariant.state_dict", "cpu")
EVEN, ODD = "AssertionError: K must be even", "AssertionError: K must be odd"


def row(seen: float | str) -> Row:
    if isinstance(seen, str):
        return Row.of(CASE, value=math.inf, detail={"holds": False, "exception": seen})
    return Row.of(CASE, value=seen, detail={"holds": seen == 0, "limit": "0"})


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (0.0, 0.0, Verdict.SAME),
        (0.0, 1.14, Verdict.WORSE),
        (0.0, EVEN, Verdict.WORSE),
        (1.14, 0.0, Verdict.BETTER),
        (EVEN, EVEN, Verdict.SAME),
        (EVEN, ODD, Verdict.SAME),  # raises on both: what it says is in the reason
        (EVEN, 1.14, Verdict.BETTER),
        (1.14, EVEN, Verdict.WORSE),
        (1.14, 1.14, Verdict.SAME),
        (1.14, 1.15, Verdict.WITHIN_NOISE),
        (0.1, 1.14, Verdict.WORSE),
        (1.14, 0.1, Verdict.BETTER),
    ],
)
def test_behaviour(a: float | str, b: float | str, verdict: Verdict) -> None:
    (entry,) = compare([row(a)], [row(b)], lambda sha: None, lambda sha: None).entries
    assert entry.verdict is verdict
    assert entry.reason


def test_two_figures_in_the_range_of_one_known_fault_are_the_same_fault() -> None:
    rows = [Row.of(CASE, value=v, detail={"holds": False, "fault": "f", "reference": "r"}) for v in (0.002, 0.006)]
    (entry,) = compare(rows[:1], rows[1:], lambda sha: None, lambda sha: None).entries
    assert entry.verdict is Verdict.WITHIN_NOISE


def test_a_missing_side() -> None:
    absent = Row.of(CASE, verdict=Verdict.MISSING, reason="cannot be installed")
    (entry,) = compare([row(0.0)], [absent], lambda sha: None, lambda sha: None).entries
    assert entry.verdict is Verdict.MISSING
    assert "cannot be installed" in entry.reason
