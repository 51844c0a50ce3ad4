"""One judgement's question and its answers, and the first of the two comparisons: against the reference. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness import family
from harness.bounds import Bounds, Rule
from harness.contracts import Member
from harness.environment import Environment
from harness.jsonvalues import decode_number
from harness.recorded import Recorded
from harness.records import Row, Verdict
from harness.stats import Estimate, paired_delta
from harness.wording import percent, shown

Losses = Callable[[str], NDArray[np.float32] | None]


@dataclass(frozen=True)
class Finding:
    """One comparison's outcome; `verdict` None where nothing is promised. `change` is in nats."""

    verdict: Verdict | None
    reason: str = ""
    change: Estimate | None = None
    floor: float = 0.0
    p: float | None = None  # of the change, where it was tested (`harness.family`)
    smallest: str = ""  # effect that this comparison could have seen, in words


@dataclass(frozen=True)
class Trial:
    """Everything one judgement looks at."""

    row: Row
    member: Member
    bounds: Bounds
    recorded: Recorded | None
    environment: Environment
    nll: Losses
    slices: list[slice] | None
    tests: int = 1  # statistical tests that the session makes

    @property
    def floor(self) -> float:
        """The larger of the bound's noise floor and the recorded one, nats (or the figure's unit)."""
        return max(self.bounds.floor(self.row.case), (self.recorded and self.recorded.floor) or 0.0)

    @property
    def room(self) -> float:
        """The change on this very text beyond which it moved, nats; infinite where no rule speaks."""
        allowance = self.bounds.allowance(self.row.case)
        return math.log(allowance) if allowance > 1 else math.inf

    def paired(self, ours: NDArray[Any], theirs: NDArray[Any]) -> Estimate:
        """The change of paired losses over the plan's windows."""
        return paired_delta(ours, theirs, self.slices or [slice(0, len(ours))])

    def losses(self, sha: Any) -> NDArray[np.float64] | None:
        """Losses by sha in float64; None where there is no sha or no file, or they are not of this many tokens."""
        values = self.nll(sha) if isinstance(sha, str) and sha else None
        if values is None or (self.slices and len(values) != self.slices[-1].stop):
            return None
        return values.astype(np.float64)


def against_reference(trial: Trial) -> Finding:
    """Whether the figure stays within what may be lost against the unquantized model, or equals its prediction."""
    row, member = trial.row, trial.member
    broken = non_finite(row, member)
    if broken is not None:
        return broken
    if "predicted_equal" in row.detail and row.value is not None:
        return _against_prediction(row, row.value)
    rule = trial.bounds.against_reference(row.case)
    if rule is None or row.method == row.reference:
        return Finding(None)
    if row.stopped_early:
        return _stopped_within(row, rule)
    return _timing_within(trial, rule) if member.timed else _value_within(row, member, rule)


def non_finite(row: Row, member: Member) -> Finding | None:
    """What a loss or figure that is not finite means; None where all are. Never averaged away."""
    ours, theirs = row.detail.get("non_finite", 0), row.detail.get("reference_non_finite", 0)
    if ours:
        whose = " of the reference" if row.method == row.reference else ""
        of = f" of {row.detail['scored']}" if "scored" in row.detail else ""
        return Finding(Verdict.OUT_OF_BOUND, f"non-finite loss in {ours}{of} tokens{whose}")
    if theirs:
        return Finding(
            Verdict.UNUSABLE, f"the reference's own loss is non-finite in {theirs} tokens: nothing to compare with"
        )
    if row.value is not None and math.isfinite(row.value):
        return None
    verdict = Verdict.UNUSABLE if member.timed else Verdict.OUT_OF_BOUND
    return Finding(verdict, f"{row.metric} is non-finite: {row.value}")


def _against_prediction(row: Row, value: float) -> Finding:
    predicted = row.detail.get("predicted", math.nan)
    if row.detail["predicted_equal"]:
        return Finding(Verdict.WITHIN_BOUND, "as predicted, to the byte")
    return Finding(
        Verdict.OUT_OF_BOUND,
        f"measured {shown(value, row.unit)}, predicted {shown(predicted, row.unit)}: {value - predicted:+,.0f} B",
    )


def _value_within(row: Row, member: Member, rule: Rule) -> Finding:
    value = row.value if row.value is not None else math.nan
    good = value >= rule.limit if rule.kind == "at_least" else value <= rule.limit
    figure = percent(value) if rule.kind == "ratio" else shown(value, row.unit)
    text = f"{row.metric} {figure} against {row.reference}, bound {rule}"
    if row.interval is not None and member.paired and rule.kind == "ratio":
        text += f" (text like this: {percent(row.interval[0])} to {percent(row.interval[1])})"
    return Finding(Verdict.WITHIN_BOUND if good else Verdict.OUT_OF_BOUND, text, smallest="exact on this text")


def _stopped_within(row: Row, rule: Rule) -> Finding:
    """A delta that was read only until it was decided: its interval against the bound; across it nothing is known."""
    detail, limit = row.detail, rule.limit
    low, high = row.interval or (-math.inf, math.inf)
    read = f"{detail['tokens_used']:,} of {detail['tokens_available']:,} tokens"
    text = f"{row.metric} {percent(low)} to {percent(high)} against {row.reference} after {read}, bound {rule}"
    seen = percent((high - low) / 2).lstrip("+")
    if low > limit:
        return Finding(Verdict.OUT_OF_BOUND, text, smallest=seen)
    if high <= limit:
        return Finding(Verdict.WITHIN_BOUND, text, smallest=seen)
    return Finding(Verdict.UNUSABLE, f"{text}: stopped at its resolution, undecided", smallest=seen)


def _timing_within(trial: Trial, rule: Rule) -> Finding:
    row = trial.row
    ratio = log_ratio(row.detail)
    if ratio is None:
        return Finding(Verdict.UNUSABLE, "the ratio to the reference has no interval: raise --repetitions")
    text = f"time {percent(ratio.value)} against {row.reference} ({percent(ratio.low)} to {percent(ratio.high)})"
    beyond = replace(ratio, value=ratio.value - rule.limit, low=ratio.low - rule.limit, high=ratio.high - rule.limit)
    half = percent(family.smallest_time(beyond, 0.0, trial.tests)).lstrip("+")
    if beyond.value > 0 and family.p_time(beyond, 0.0) <= family.level(trial.tests):
        return Finding(Verdict.OUT_OF_BOUND, f"{text}, bound {rule}", smallest=half)
    if ratio.high <= rule.limit:
        return Finding(Verdict.WITHIN_BOUND, f"{text}, bound {rule}", smallest=half)
    return Finding(Verdict.UNUSABLE, f"{text}: too wide to decide on the bound {rule}", smallest=half)


def log_ratio(detail: Mapping[str, Any]) -> Estimate | None:
    """A timing's log ratio to the reference with its interval; None where there is no interval."""
    value, low, high = (decode_number(detail.get(f"log_ratio{end}")) for end in ("", "_low", "_high"))
    if value is None or low is None or high is None or not math.isfinite(high - low):
        return None
    return Estimate(value, low, high, 0, True)
