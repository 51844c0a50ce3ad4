"""Against the reference of the same run: what may be lost, and figures that were predicted. No torch."""

from __future__ import annotations

import math
from dataclasses import replace

from harness.core.contracts import Member
from harness.core.records import Row, Verdict
from harness.core.text import percent
from harness.judge import error_rate
from harness.judge.bounds import Rule
from harness.judge.compare import log_ratio
from harness.judge.question import Outcome, Question, read
from harness.judge.wording import shown


def against_reference(question: Question) -> Outcome:
    """Whether the figure stays within what may be lost against the unquantized model, or equals its prediction."""
    row, member = question.row, question.member
    broken = non_finite(row, member)
    if broken is not None:
        return broken
    if "predicted_equal" in row.detail and row.value is not None:
        return _against_prediction(row, row.value)
    rule = question.bounds.against_reference(row.case)
    if rule is None or row.method == row.reference:
        return Outcome(None)
    if row.stopped_early:
        return _stopped_within(row, rule)
    return _timing_within(question, rule) if member.timed else _value_within(row, member, rule)


def non_finite(row: Row, member: Member) -> Outcome | None:
    """What a loss or figure that is not finite means; None where all are. Never averaged away."""
    ours, theirs = row.detail.get("non_finite", 0), row.detail.get("reference_non_finite", 0)
    if ours:
        whose = " of the reference" if row.method == row.reference else ""
        of = f" of {row.detail['scored']}" if "scored" in row.detail else ""
        return Outcome(Verdict.OUT_OF_BOUND, f"non-finite loss in {ours}{of} tokens{whose}")
    if theirs:
        return Outcome(
            Verdict.UNUSABLE, f"the reference's own loss is non-finite in {theirs} tokens: nothing to compare with"
        )
    if row.value is not None and math.isfinite(row.value):
        return None
    verdict = Verdict.UNUSABLE if member.timed else Verdict.OUT_OF_BOUND
    return Outcome(verdict, f"{row.metric} is non-finite: {row.value}")


def _against_prediction(row: Row, value: float) -> Outcome:
    predicted = row.detail.get("predicted", math.nan)
    if row.detail["predicted_equal"]:
        return Outcome(Verdict.WITHIN_BOUND, "as predicted, to the byte")
    return Outcome(
        Verdict.OUT_OF_BOUND,
        f"measured {shown(value, row.unit)}, predicted {shown(predicted, row.unit)}: {value - predicted:+,.0f} B",
    )


def _value_within(row: Row, member: Member, rule: Rule) -> Outcome:
    value = row.value if row.value is not None else math.nan
    good = value >= rule.limit if rule.kind == "at_least" else value <= rule.limit
    figure = percent(value) if rule.kind == "ratio" else shown(value, row.unit)
    text = f"{row.metric} {figure} against {row.reference}, bound {rule}"
    if row.interval is not None and member.paired and rule.kind == "ratio":
        text += f" (text like this: {percent(row.interval[0])} to {percent(row.interval[1])})"
    return Outcome(Verdict.WITHIN_BOUND if good else Verdict.OUT_OF_BOUND, text, smallest="exact on this text")


def _stopped_within(row: Row, rule: Rule) -> Outcome:
    """A delta that was read only until it was decided: its interval against the bound; across it nothing is known."""
    limit = rule.limit
    low, high = row.interval or (-math.inf, math.inf)
    text = f"{row.metric} {percent(low)} to {percent(high)} against {row.reference} after {read(row)}, bound {rule}"
    seen = percent((high - low) / 2, sign="")
    if low > limit:
        return Outcome(Verdict.OUT_OF_BOUND, text, smallest=seen)
    if high <= limit:
        return Outcome(Verdict.WITHIN_BOUND, text, smallest=seen)
    return Outcome(Verdict.UNUSABLE, f"{text}: stopped at its resolution, undecided", smallest=seen)


def _timing_within(question: Question, rule: Rule) -> Outcome:
    row = question.row
    ratio = log_ratio(row.detail)
    if ratio is None:
        return Outcome(Verdict.UNUSABLE, "the ratio to the reference has no interval: raise --repetitions")
    text = f"time {percent(ratio.value)} against {row.reference} ({percent(ratio.low)} to {percent(ratio.high)})"
    beyond = replace(ratio, value=ratio.value - rule.limit, low=ratio.low - rule.limit, high=ratio.high - rule.limit)
    half = percent(error_rate.smallest_time(beyond, 0.0, question.tests), sign="")
    if beyond.value > 0 and error_rate.p_time(beyond, 0.0) <= error_rate.level(question.tests):
        return Outcome(Verdict.OUT_OF_BOUND, f"{text}, bound {rule}", smallest=half)
    if ratio.high <= rule.limit:
        return Outcome(Verdict.WITHIN_BOUND, f"{text}, bound {rule}", smallest=half)
    return Outcome(Verdict.UNUSABLE, f"{text}: too wide to decide on the bound {rule}", smallest=half)
