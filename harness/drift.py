"""The second of the two comparisons: against the recorded baseline. No torch."""

from __future__ import annotations

import math
import re
from typing import Any

from numpy.typing import NDArray

from harness import family
from harness.contracts import Member
from harness.environment import Environment, class_difference
from harness.jsonvalues import decode_number
from harness.recorded import Recorded, rounded
from harness.records import Row, Verdict
from harness.stats import FEWEST_WINDOWS, Estimate
from harness.trial import Finding, Trial, log_ratio, non_finite
from harness.wording import command, percent, shown, signed

MOVERS = "torch, transformers, tokenizers or the processor"
# a file's text is named by the revision, a sha256 of its content: where it lies is provenance, no protocol
FILE_NAME = re.compile(r"^text: (?:text|package):[^;]*?, revision ")
MOVED = frozenset({Verdict.WORSE, Verdict.BETTER})
SUM_DIGITS = 1e-8  # a record keeps ten digits; a sum in another order moves the last of a double's sixteen


def against_record(trial: Trial) -> Finding:
    """Whether the figure is what was recorded."""
    row, member, recorded = trial.row, trial.member, trial.recorded
    if row.stopped_early:
        read = f"{row.detail['tokens_used']:,} of {row.detail['tokens_available']:,} tokens"
        return Finding(
            Verdict.NOT_COMPARABLE, f"stopped early ({row.detail['decided']}) after {read}: no whole-text figure"
        )
    if recorded is None:
        return Finding(Verdict.UNRECORDED, f"no record; to record it: {command(row, '--regen-all')}")
    field = incomparable(row, member, recorded, trial.environment)
    if field:
        return Finding(Verdict.NOT_COMPARABLE, f"not comparable with {recorded.file}, {field}")
    if row.value is None or non_finite(row, member) is not None:
        return Finding(Verdict.UNUSABLE, "a figure that is not finite has no change")
    if member.exact:
        return exact(row.value, row, member, recorded)
    if member.timed:
        return timing(trial, recorded)
    if row.case.family == "perplexity":
        return loss(row.value, trial, recorded)
    return plain(row.value, trial, recorded)


def incomparable(row: Row, member: Member, recorded: Recorded, environment: Environment) -> str:
    """The field that forbids the comparison, with both values; '' where nothing does."""
    if member.exact:
        return ""
    if (member.paired or member.timed) and recorded.reference != row.reference:
        return f"reference: {recorded.reference} -> {row.reference}"
    if FILE_NAME.sub("text: revision ", recorded.protocol_id) != FILE_NAME.sub("text: revision ", row.protocol_id):
        parts = zip(recorded.protocol_id.split("; "), row.protocol_id.split("; "), strict=False)
        changed = [f"{before} -> {now}" for before, now in parts if before != now]
        return f"protocol id: {', '.join(changed) or f'{recorded.protocol_id} -> {row.protocol_id}'}"
    if recorded.token_hash != row.token_hash:
        return f"token hash: {recorded.token_hash[:12]} -> {row.token_hash[:12]}"
    lasting = bool(row.dataset) and not member.timed  # losses: carried over one device class
    if lasting and min(recorded.count, row.count) > 1 and recorded.count != row.count:
        return f"count of {'windows' if member.paired else 'tokens'} scored: {recorded.count} -> {row.count}"
    if lasting and recorded.revision != row.revision:
        return f"weights: revision {recorded.revision[:12]} -> {row.revision[:12]}"
    if not recorded.carries:
        return recorded.difference
    if not lasting and (changed_class := class_difference(recorded.environment, environment)):
        return changed_class
    if member.timed and recorded.environment.machine != environment.machine:
        return f"machine: {recorded.environment.machine} -> {environment.machine}"
    return ""


def exact(value: float, row: Row, member: Member, recorded: Recorded) -> Finding:
    """A fact that must be equal."""
    if value == recorded.value:
        return Finding(Verdict.SAME, "equal to the record", smallest="1 B")
    less = value < recorded.value
    better = member.better == ("lower" if less else "higher")
    text = f"{shown(value, row.unit)}, recorded {shown(recorded.value, row.unit)}: {value - recorded.value:+,.0f}"
    return Finding(Verdict.BETTER if better else Verdict.WORSE, text, smallest="1 B")


def plain(value: float, trial: Trial, recorded: Recorded) -> Finding:
    """A figure without pairs: beyond its allowance or floor, whichever is wider, it moved."""
    row, member = trial.row, trial.member
    room = max(trial.floor, abs(recorded.value) * (trial.bounds.allowance(row.case) - 1))
    seen = shown(room, row.unit)
    if rounded(value) == recorded.value:
        return Finding(Verdict.SAME, "equal to the record", smallest=seen)
    change = value - recorded.value
    text = f"{shown(value, row.unit)}, recorded {shown(recorded.value, row.unit)}, allowance {seen}"
    if abs(change) <= room:
        return Finding(Verdict.WITHIN_NOISE, text, smallest=seen)
    better = member.better == ("lower" if change < 0 else "higher")
    return Finding(Verdict.BETTER if better else Verdict.WORSE, text, smallest=seen)


def timing(trial: Trial, recorded: Recorded) -> Finding:
    """The log ratio to the reference now minus the recorded one, both with their intervals (added in quadrature)."""
    row = trial.row
    now, then = log_ratio(row.detail), log_ratio(recorded.detail)
    if now is None or then is None:
        whose = "this run's" if now is None else "the recorded"
        return Finding(Verdict.UNUSABLE, f"{whose} ratio to the reference has no interval: raise --repetitions")
    change = now.value - then.value
    low = change - math.hypot(now.value - now.low, then.high - then.value)
    high = change + math.hypot(now.high - now.value, then.value - then.low)
    floors = (decode_number(detail.get("aa_floor")) or 0.0 for detail in (row.detail, recorded.detail))
    limit = max(*floors, trial.floor, math.log(trial.bounds.allowance(row.case)))
    found = Estimate(change, low, high, row.count, True)
    text = f"ratio to {row.reference} {percent(change)} against the record ({percent(low)} to {percent(high)})"
    p = family.p_time(found, limit)
    seen = percent(family.smallest_time(found, limit, trial.tests)).lstrip("+")
    if p <= family.level(trial.tests):
        word = Verdict.WORSE if change > 0 else Verdict.BETTER
        return Finding(word, f"{text}, limit {percent(limit)}", found, limit, p, seen)
    if high - low > 2 * limit:
        wide = f"{text}: too wide to see a change of {percent(limit)}"
        return Finding(Verdict.UNUSABLE, wide, found, limit, p, seen)
    return Finding(Verdict.WITHIN_NOISE, text, found, limit, p, seen)


def decide(change: Estimate, floor: float, tests: int = 1, room: float = math.inf) -> Verdict:
    """A loss's change in nats against what is noise, and on this very text against what is tolerated.

    *Text like this*: it moved where the session's share of the error rate rejects that it is within the floor.
    *This text*: the change is exact, so that one beyond `room` moved, however windows differ (a fault that meets one
    window of many has no interval that shows it). Without a usable interval only what is beneath the floor is decided.
    """
    moved = Verdict.WORSE if change.value > 0 else Verdict.BETTER
    if abs(change.value) > max(room, floor):
        return moved
    if not change.usable:
        return Verdict.WITHIN_NOISE if abs(change.value) <= floor else Verdict.UNUSABLE
    return moved if family.p_loss(change, floor) <= family.level(tests) else Verdict.WITHIN_NOISE


def loss(value: float, trial: Trial, recorded: Recorded) -> Finding:
    """Perplexity in all its forms, and the paired loss: paired over windows with the recorded losses, in nats."""
    row, member, floor = trial.row, trial.member, trial.floor
    now, then = row.detail.get("reference_nll"), recorded.detail.get("reference_nll")
    same_pair = not member.paired or (now == then if now else rounded(value) == recorded.value)
    if row.nll and row.nll == recorded.nll and same_pair:
        return _same_losses(value, trial, recorded)
    moved = reference_change(trial, recorded)
    change = paired_change(trial, recorded) if member.paired else own_change(trial, recorded)
    if change is None:
        return _by_value(value, trial, recorded)
    verdict = decide(change, floor, trial.tests, trial.room)
    p = family.p_loss(change, floor) if change.usable else None
    seen = percent(min(trial.room, family.smallest_loss(change, floor, trial.tests))).lstrip("+")
    text = f"{signed(change.value)} against the record ({change.low:+.3g} to {change.high:+.3g}, floor {floor:.3g})"
    if verdict in MOVED and (p is None or p > family.level(trial.tests)):
        text += f": beyond {percent(trial.room)} on this very text, where it is exact"
    if verdict is Verdict.UNUSABLE:
        text += f": {change.count} windows, fewer than {FEWEST_WINDOWS}, cannot tell it from noise"
    return Finding(verdict, text + blame(trial, recorded, verdict, moved), change, floor, p, seen)


def _same_losses(value: float, trial: Trial, recorded: Recorded) -> Finding:
    """Every token's loss is the recorded one: so must the figure be, but for the last digits of a sum."""
    row, seen = trial.row, percent(trial.floor).lstrip("+")
    if math.isclose(value, recorded.value, rel_tol=SUM_DIGITS, abs_tol=SUM_DIGITS):
        return Finding(Verdict.SAME, "every token's loss bit-identical to the record", smallest=seen)
    text = (
        f"{shown(value, row.unit)}, recorded {shown(recorded.value, row.unit)}, from losses bit-identical to the "
        "record: what is made of them changed (windows, weights or aggregate)"
    )
    return Finding(Verdict.WORSE if value > recorded.value else Verdict.BETTER, text, smallest=seen)


def _by_value(value: float, trial: Trial, recorded: Recorded) -> Finding:
    """Without the recorded losses only the figures can be set against each other."""
    logarithm = trial.row.unit.startswith("ppl") and recorded.value > 0
    change = math.log(value / recorded.value) if logarithm else value - recorded.value
    lost = "the per-token losses of the record or of this run are not there to pair"
    if rounded(value) == recorded.value or abs(change) <= trial.floor:
        return Finding(Verdict.WITHIN_NOISE, f"{change:+.3g} against the record's value; {lost}")
    return Finding(Verdict.UNUSABLE, f"{change:+.3g} against the record's value, but {lost}: record again")


def own_change(trial: Trial, recorded: Recorded) -> Estimate | None:
    """This model's losses now minus then; None where either is not there."""
    return _difference(trial, trial.losses(trial.row.nll), trial.losses(recorded.nll))


def reference_change(trial: Trial, recorded: Recorded) -> Estimate | None:
    """The reference's losses now minus then; None where either is not there, or they are the same."""
    now, then = trial.row.detail.get("reference_nll"), recorded.detail.get("reference_nll")
    return None if now == then else _difference(trial, trial.losses(now), trial.losses(then))


def paired_change(trial: Trial, recorded: Recorded) -> Estimate | None:
    """The loss against the reference now minus then, token by token; None where one of the four is not there."""
    found = [
        trial.losses(sha)
        for detail, nll in ((trial.row.detail, trial.row.nll), (recorded.detail, recorded.nll))
        for sha in (nll, detail.get("reference_nll"))
    ]
    ours, reference, theirs, recorded_reference = found
    if ours is None or reference is None or theirs is None or recorded_reference is None:
        return None
    return _difference(trial, ours - reference, theirs - recorded_reference)


def _difference(trial: Trial, now: NDArray[Any] | None, then: NDArray[Any] | None) -> Estimate | None:
    if now is None or then is None or now.shape != then.shape:
        return None
    change = trial.paired(now, then)
    return change if math.isfinite(change.value) else None


def blame(trial: Trial, recorded: Recorded, verdict: Verdict, moved: Estimate | None) -> str:
    """Whether the unquantized reference moved too: then it was not the quantizer; '' where nothing can be said."""
    row = trial.row
    if row.method == row.reference:
        return f"; the unquantized reference itself moved: {MOVERS} did it, no quantizer" if verdict in MOVED else ""
    if moved is None or decide(moved, trial.floor, 1, trial.room) not in MOVED:
        return ""
    told = f"; the unquantized reference itself moved by {signed(moved.value)}"
    apart = paired_change(trial, recorded)
    if apart is None or decide(apart, trial.floor, 1, trial.room) in {*MOVED, Verdict.UNUSABLE}:
        return told
    return f"{told} and the loss against it did not: {MOVERS} did it, not the quantizer"
