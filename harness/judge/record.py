"""Against the record: whether a figure is what was recorded, in words; the rules are `compare`'s. No torch."""

from __future__ import annotations

from dataclasses import replace

from harness.core.records import Row, Verdict
from harness.core.stats import FEWEST_WINDOWS, Estimate
from harness.core.text import percent
from harness.judge import compare, error_rate
from harness.judge.compare import MOVED, Obstacle
from harness.judge.question import Outcome, Question, stopped
from harness.judge.recorded import Recorded
from harness.judge.wording import command, shown, signed

MOVERS = "torch, transformers, tokenizers or the processor"
BRIEF = 12  # characters of a hash that tell it from another in a line


def against_record(question: Question) -> Outcome:
    """Whether the figure is what was recorded."""
    row, recorded = question.row, question.before
    if row.stopped_early:
        return Outcome(Verdict.NOT_COMPARABLE, stopped(row))
    if recorded is None:
        return Outcome(Verdict.UNRECORDED, f"no record; to record it: {command(row, '--regen-all')}")
    assert isinstance(recorded, Recorded)  # a row of another report has its own words
    if found := compare.obstacle(question, recorded):
        return Outcome(Verdict.NOT_COMPARABLE, f"not comparable with {recorded.file}, {told(found, question)}")
    if row.value is None:
        return Outcome(Verdict.UNUSABLE, "a figure that is not finite has no change")
    outcome = compare.outcome(question, recorded, recorded.value, row.value)
    if outcome.ground == compare.NOT_FINITE:
        return replace(outcome, reason=_not_finite(outcome, row, recorded))
    if outcome.ground == compare.FIGURE:
        return _figure(question, outcome, row.value, recorded.value)
    if outcome.ground == compare.RATIO:
        return _time(question, outcome)
    return _loss(question, outcome, row.value, recorded)


def told(found: Obstacle, question: Question) -> str:
    """The field that forbids the comparison, with both values."""
    field, before, now = found
    if now is None:
        return str(before)
    if field == "protocol_id":
        parts = zip(before.split("; "), now.split("; "), strict=False)
        changed = [f"{old} -> {new}" for old, new in parts if old != new]
        return f"protocol id: {', '.join(changed) or f'{before} -> {now}'}"
    if field == "token_hash":
        return f"token hash: {before[:BRIEF]} -> {now[:BRIEF]}"
    if field == "revision":
        return f"weights: revision {before[:BRIEF]} -> {now[:BRIEF]}"
    if field == "count":
        field = f"count of {'windows' if question.member.paired else 'tokens'} scored"
    return f"{field}: {before} -> {now}"


def _not_finite(outcome: Outcome, row: Row, recorded: Recorded) -> str:
    if outcome.verdict is Verdict.UNUSABLE or row.value is None:
        return "a figure that is not finite has no change"
    return f"{shown(row.value, row.unit)}, recorded {shown(recorded.value, recorded.unit)}"


def _figure(question: Question, outcome: Outcome, now: float, then: float) -> Outcome:
    unit, exact = question.row.unit, question.member.exact
    seen = "1 B" if exact else shown(outcome.floor, unit)
    if outcome.verdict is Verdict.SAME:
        return replace(outcome, reason="equal to the record", smallest=seen)
    ending = f": {now - then:+,.0f}" if exact else f", allowance {seen}"
    return replace(outcome, reason=f"{shown(now, unit)}, recorded {shown(then, unit)}{ending}", smallest=seen)


def _time(question: Question, outcome: Outcome) -> Outcome:
    change, limit, row = outcome.change, outcome.floor, question.row
    if change is None:
        whose = "this run's" if compare.log_ratio(row.detail) is None else "the recorded"
        return replace(outcome, reason=f"{whose} ratio to the reference has no interval: raise --repetitions")
    text = f"ratio to {row.reference} {percent(change.value)} against the record "
    text += f"({percent(change.low)} to {percent(change.high)})"
    if outcome.verdict is Verdict.UNUSABLE:
        text += f": too wide to see a change of {percent(limit)}"
    elif outcome.verdict in MOVED:
        text += f", limit {percent(limit)}"
    seen = percent(error_rate.smallest_time(change, limit, question.tests), sign="")
    return replace(outcome, reason=text, smallest=seen)


def _loss(question: Question, outcome: Outcome, now: float, recorded: Recorded) -> Outcome:
    row, change = question.row, outcome.change
    if change is not None:
        return _paired(question, outcome, change, recorded)
    if outcome.ground == compare.VALUES:
        shift = compare.value_change(row.metric, recorded.value, now) or 0.0
        lost = "the per-token losses of the record or of this run are not there to pair"
        beneath = outcome.verdict is Verdict.WITHIN_NOISE
        ending = f"; {lost}" if beneath else f", but {lost}: record again"
        return replace(outcome, reason=f"{shift:+.3g} against the record's value{ending}")
    text = "every token's loss bit-identical to the record"
    if outcome.verdict in MOVED:
        text = (
            f"{shown(now, row.unit)}, recorded {shown(recorded.value, row.unit)}, from losses bit-identical to the "
            "record: what is made of them changed (windows, weights or aggregate)"
        )
    return replace(outcome, reason=text, smallest=percent(question.floor, sign=""))


def _paired(question: Question, outcome: Outcome, change: Estimate, recorded: Recorded) -> Outcome:
    floor, room = outcome.floor, question.room
    seen = percent(min(room, error_rate.smallest_loss(change, floor, question.tests)), sign="")
    text = f"{signed(change.value)} against the record ({change.low:+.3g} to {change.high:+.3g}, floor {floor:.3g})"
    if outcome.ground == compare.THIS_TEXT:
        text += f": beyond {percent(room)} on this very text, where it is exact"
    if outcome.verdict is Verdict.UNUSABLE:
        text += f": {change.count} windows, fewer than {FEWEST_WINDOWS}, cannot tell it from noise"
    return replace(outcome, reason=text + blame(question, recorded, outcome.verdict), smallest=seen)


def blame(question: Question, recorded: Recorded, verdict: Verdict | None) -> str:
    """Whether the unquantized reference moved too: then it was not the quantizer; '' where nothing can be said."""
    row, floor, room = question.row, question.floor, question.room
    if row.method == row.reference:
        return f"; the unquantized reference itself moved: {MOVERS} did it, no quantizer" if verdict in MOVED else ""
    moved = compare.reference_change(question, recorded)
    if moved is None or compare.decide(moved, floor, 1, room) not in MOVED:
        return ""
    text = f"; the unquantized reference itself moved by {signed(moved.value)}"
    apart = compare.paired_change(question, recorded)
    if apart is None or compare.decide(apart, floor, 1, room) in {*MOVED, Verdict.UNUSABLE}:
        return text
    return f"{text} and the loss against it did not: {MOVERS} did it, not the quantizer"
