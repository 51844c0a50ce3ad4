"""The rules that give one case its word in a comparison: what forbids it, and how bytes and times are decided."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from harness.contracts import Member
from harness.jsonvalues import decode_number
from harness.records import Case, Row, Verdict


@dataclass(frozen=True)
class Entry:
    """One case on both sides.

    `change` with `low` and `high` is ln(B / A), or B - A where `is_ratio` is False; None where nothing was computed.
    `verdict` is None for what is never judged (the reference's own time).
    """

    case: Case
    a: Row
    b: Row
    verdict: Verdict | None
    reason: str
    change: float | None = None
    low: float | None = None
    high: float | None = None
    is_ratio: bool = True
    paired: bool = False  # token by token


def differing(a: Row, b: Row) -> str:
    """The first field that forbids a comparison, with both values; "" where there is none."""
    pairs = [(name, getattr(a, name), getattr(b, name)) for name in ("protocol_id", "token_hash", "unit")]
    if a.case.family == "latency":
        names = ("prompt_tokens", "new_tokens")
        pairs += [(f"detail.{name}", a.detail.get(name), b.detail.get(name)) for name in names]
    return next((f"{name} differs: '{one}' -> '{other}'" for name, one, other in pairs if one != other), "")


def same(a: float, b: float) -> bool:
    """Equal, or both not a number."""
    return a == b or (math.isnan(a) and math.isnan(b))


def decide(low: float, high: float, floor: float) -> Verdict:
    """The verdict of an interval of ln(B / A), lower is better: a change counts when all of it is past the floor."""
    return Verdict.WORSE if low > floor else Verdict.BETTER if high < -floor else Verdict.WITHIN_NOISE


def moved(a: float, b: float, metric: str) -> dict[str, Any]:
    """`change` and `is_ratio` of an entry: ln(B / A) for perplexity, bytes and times, else B - A.

    perplexity.delta is a log ratio already, so that its difference is one.
    """
    finite = math.isfinite(a) and math.isfinite(b)
    if metric == "perplexity.delta":
        return {"change": b - a if finite else None}
    if metric.partition(".")[0] not in ("perplexity", "memory", "latency"):
        return {"change": b - a if finite else None, "is_ratio": False}
    return {"change": math.log(b / a) if finite and a > 0 and b > 0 else 0.0 if same(a, b) else None}


def absent(blank: Entry) -> Entry:
    """A case without a number on at least one side."""
    a, b = blank.a, blank.b
    if b.value is None and a.value is not None:
        return replace(blank, verdict=Verdict.MISSING, reason=f"missing in B: {b.reason or 'no reason was given'}")
    where = "both" if b.value is None else "A"
    return replace(blank, verdict=Verdict.UNUSABLE, reason=f"missing in {where}: {a.reason or 'no reason was given'}")


def broken(blank: Entry, a: float, b: float) -> Entry | None:
    """Non-finite values, which no interval can judge."""
    fine = [math.isfinite(a), math.isfinite(b)]
    if all(fine):
        return None
    if not any(fine):
        return replace(blank, verdict=Verdict.UNUSABLE, reason="not finite on both sides")
    verdict = Verdict.WORSE if fine[0] else Verdict.BETTER
    return replace(blank, verdict=verdict, reason=f"not finite in {'B' if fine[0] else 'A'}")


def timed(blank: Entry, allowance: float) -> Entry:
    """A time, judged by its log ratio to the reference of its own session; the reference's own time is not judged.

    The two sessions are independent, so the half-widths of their intervals add in squares. What lies within the
    larger of the A/A floors and `allowance` (a ratio) is noise; an interval across that limit is too wide to decide.
    """
    a, b = blank.a, blank.b
    if a.detail.get("turns") and a.detail.get("turns") == b.detail.get("turns"):
        return turned(blank, allowance)
    if blank.case.method == blank.case.reference:
        times = moved(a.value or 0.0, b.value or 0.0, blank.case.metric)
        return replace(blank, reason="the reference's own time is shown, not judged", **times)
    one, two = (_log_ratio(row) for row in (a, b))
    if one is None or two is None or False in (a.detail.get("log_ratio_usable"), b.detail.get("log_ratio_usable")):
        return replace(blank, verdict=Verdict.UNUSABLE, reason="no usable ratio to the reference on both sides")
    change = two[0] - one[0]
    low = change - math.hypot(two[0] - two[1], one[2] - one[0])
    high = change + math.hypot(two[2] - two[0], one[0] - one[1])
    floor = max(math.log(allowance), *(_number(row.detail.get("aa_floor")) or 0.0 for row in (a, b)))
    found = replace(blank, change=change, low=low, high=high)
    limit = f"noise up to {100 * math.expm1(floor):.3g}%"
    verdict = decide(low, high, floor)
    if verdict is Verdict.WITHIN_NOISE and (low < -floor or high > floor):
        return replace(found, verdict=Verdict.UNUSABLE, reason=f"the ratio's interval is too wide to decide; {limit}")
    return replace(found, verdict=verdict, reason=f"ratio to the reference; {limit}")


def turned(blank: Entry, allowance: float) -> Entry:
    """Times that both sides took in turn in one session, paired block by block; the reference's own is judged too."""
    a, b = blank.a, blank.b
    if len(a.samples) != len(b.samples) or not a.samples:
        return replace(blank, verdict=Verdict.UNUSABLE, reason="the two sides have not equally many repetitions")
    from harness.stats import hodges_lehmann_ratio  # numpy, which nothing untimed needs

    ratio = hodges_lehmann_ratio(b.samples, a.samples)
    floor = max(math.log(allowance), *(_number(row.detail.get("aa_floor")) or 0.0 for row in (a, b)))
    found = replace(blank, change=ratio.value, low=ratio.low, high=ratio.high)
    limit = f"over {ratio.count} blocks; noise up to {100 * math.expm1(floor):.3g}%"
    if not ratio.usable:
        return replace(found, verdict=Verdict.UNUSABLE, reason=f"no interval {limit}")
    verdict = decide(ratio.low, ratio.high, floor)
    if verdict is Verdict.WITHIN_NOISE and (ratio.low < -floor or ratio.high > floor):
        return replace(found, verdict=Verdict.UNUSABLE, reason=f"the interval is too wide to decide {limit}")
    return replace(found, verdict=verdict, reason=f"taken in turn {limit}")


def _log_ratio(row: Row) -> tuple[float, float, float] | None:
    """The log ratio with its interval, None unless all three are finite."""
    value, low, high = (_number(row.detail.get(name)) for name in ("log_ratio", "log_ratio_low", "log_ratio_high"))
    return None if value is None or low is None or high is None else (value, low, high)


def _number(value: Any) -> float | None:
    value = decode_number(value)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def valued(blank: Entry, member: Member | None, allowance: float, a: float, b: float) -> Entry:
    """A number without a pairing: bytes to the byte (peaks within a ratio of `allowance`), others by intervals."""
    shift = moved(a, b, blank.case.metric)
    if same(a, b):
        return replace(blank, verdict=Verdict.SAME, reason="equal values", **shift)
    if found := broken(blank, a, b):
        return found
    if member is None or member.better not in ("lower", "higher"):
        return replace(blank, verdict=Verdict.UNUSABLE, reason="values differ and no direction is better", **shift)
    worse = (b > a) == (member.better == "lower")
    verdict = Verdict.WORSE if worse else Verdict.BETTER
    if blank.case.family == "memory" and allowance > 1 and not member.exact:
        small = max(a, b) <= allowance * min(a, b)
        reason = f"observed once; noise up to {100 * (allowance - 1):.3g}%"
        return replace(blank, verdict=Verdict.WITHIN_NOISE if small else verdict, reason=reason, **shift)
    if member.exact or blank.case.family == "memory":
        return replace(blank, verdict=verdict, reason=f"{b - a:+,.0f} {blank.b.unit}, exact", **shift)
    one, two = blank.a.interval, blank.b.interval
    if one is None or two is None:
        return replace(
            blank, verdict=Verdict.UNUSABLE, reason="values differ, nothing was paired: no interval", **shift
        )
    apart = one[1] < two[0] or two[1] < one[0]
    reason = "the two intervals " + ("lie apart" if apart else "overlap") + "; nothing was paired"
    return replace(blank, verdict=verdict if apart else Verdict.WITHIN_NOISE, reason=reason, **shift)
