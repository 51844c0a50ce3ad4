"""How often a session may be wrong: every statistical verdict of a session is one test of one family. No torch.

At most 5% of sessions in which nothing changed raise an alarm. Of m tests in a session each is decided at once at
0.05 / m (Bonferroni), since a case's test ends before the session does; at the session's end Holm's step-down over
those against the record (`settle`) may only add to what was rejected. What is exact (bytes, census, token hashes, a
figure on the very text that was read) is no test: it cannot be wrong by chance.

A change's p value is two-sided for |true change| <= floor: for losses Student's t over windows, for times the normal
limit of the interval that was combined from both sessions (`tests/judge/test_error_rate.py` holds both to SciPy).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any

from harness.core.catalog import member_of
from harness.core.records import Case, Row, Verdict
from harness.core.stats import CONFIDENCE, Estimate, holm, student_coverage, student_quantile
from harness.core.values import decode_number
from harness.judge.bounds import Bounds

ALPHA = 1 - CONFIDENCE  # of a whole session
RELIABLY = 0.9  # an effect is seen reliably where nine of ten sessions would call it
NORMAL = NormalDist()


def tests(cases: Iterable[Case], bounds: Bounds, *, stop_early: bool) -> int:
    """How many statistical tests a session of these cases makes, at least 1.

    A loss against its record is one; read early, it is one against its bound instead, where it has one. A time is
    one against its record, and one more where it has a bound against the reference.
    """
    count = 0
    for case in cases:
        bounded = bounds.against_reference(case) is not None
        if member_of(case).timed:
            count += 1 + bounded
        elif case.family == "perplexity":
            count += bounded if stop_early and case.metric == "perplexity.delta" else 1
    return max(1, count)


def level(count: int) -> float:
    """The error probability that one of `count` tests may have."""
    return ALPHA / max(1, count)


def standard_error(change: Estimate) -> float:
    """Of a mean over windows, from its interval; nats."""
    return (change.high - change.low) / 2 / student_quantile(CONFIDENCE, change.count - 1)


def p_loss(change: Estimate, floor: float) -> float:
    """Two-sided p value that a loss's true change is within +-floor (nats): Student's t over its windows."""
    beyond, error = abs(change.value) - floor, standard_error(change)
    if beyond <= 0:
        return 1.0
    return max(0.0, 1 - student_coverage(beyond / error, change.count - 1)) if error > 0 else 0.0


def p_time(change: Estimate, limit: float) -> float:
    """The same for a log ratio, from the half of its interval that faces zero, in the normal limit."""
    beyond = abs(change.value) - limit
    half = change.value - change.low if change.value > 0 else change.high - change.value
    if beyond <= 0:
        return 1.0
    return 2 * NORMAL.cdf(-beyond / (half / NORMAL.inv_cdf((1 + CONFIDENCE) / 2))) if half > 0 else 0.0


def smallest_loss(change: Estimate, floor: float, count: int) -> float:
    """The smallest true change, nats, that nine of ten sessions with this spread would have called."""
    if change.count < 2:
        return math.inf
    degrees = change.count - 1
    quantiles = student_quantile(1 - level(count), degrees) + student_quantile(2 * RELIABLY - 1, degrees)
    return floor + quantiles * standard_error(change)


def smallest_time(change: Estimate, limit: float, count: int) -> float:
    """The same for a log ratio."""
    half = max(change.high - change.value, change.value - change.low)
    quantiles = NORMAL.inv_cdf(1 - level(count) / 2) + NORMAL.inv_cdf(RELIABLY)
    return limit + quantiles * half / NORMAL.inv_cdf((1 + CONFIDENCE) / 2)


def settle(rows: Sequence[Row], count: int) -> list[Row]:
    """Holm's step-down over a finished session's tests against the record.

    Args:
        rows: judged, one a case.
        count: of `tests`, those against a bound included: their share of the session's 5% is spent already.

    Returns:
        The rows; one that was `within noise` by itself and is rejected by Holm is `worse` or `better` now.
    """
    tested = [(place, p) for place, row in enumerate(rows) if (p := _p(row)) is not None]
    adjusted = holm([p for _, p in tested])
    budget = ALPHA * min(1.0, len(tested) / max(1, count))
    settled = list(rows)
    for (place, p), value in zip(tested, adjusted, strict=True):
        row = rows[place]
        if value <= budget and row.verdict_baseline is Verdict.WITHIN_NOISE:
            word = Verdict.WORSE if decode_number(row.detail["change"]["value"]) > 0 else Verdict.BETTER
            severest = min((word, row.verdict), key=lambda verdict: verdict.severity)
            verdict = word if row.verdict is Verdict.WITHIN_NOISE else severest
            reason = f"{row.reason}; {word} by Holm's step over the session's {len(tested)} tests (p {p:.2g})"
            settled[place] = replace(row, verdict=verdict, verdict_baseline=word, reason=reason)
    return settled


def _p(row: Row) -> float | None:
    change: Any = row.detail.get("change")
    p = decode_number(change.get("p")) if isinstance(change, dict) and row.value is not None else None
    return float(p) if p is not None else None
