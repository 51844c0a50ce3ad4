"""The rules that hold a figure against an earlier one: what forbids it, and what its change is called. No torch.

The earlier figure is a record or a row of an earlier report (`question`). The rules are the same for both, but
for two things that the question says: how many tests share its error rate, and whether environments and weights may
differ. They give no reasons: `verdicts` and `two_reports` say in their own words what was found.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from numpy.typing import NDArray

from harness.core.environment import class_difference
from harness.core.records import Row, Verdict
from harness.core.stats import Estimate, hodges_lehmann_ratio, paired_delta
from harness.core.values import decode_number
from harness.judge import error_rate
from harness.judge.question import Outcome, Question, stopped
from harness.judge.recorded import Recorded, rounded

MOVED = frozenset({Verdict.WORSE, Verdict.BETTER})
# a file's text is named by the revision, a sha256 of its content: where it lies is provenance, no protocol
FILE_NAME = re.compile(r"^text: (?:text|package):[^;]*?, revision ")
LENGTHS = ("prompt_tokens", "new_tokens")  # of a timing's detail; a record keeps none
SUM_DIGITS = 1e-8  # a record keeps ten digits; a sum in another order moves the last of a double's sixteen
RATIOS = ("perplexity", "memory", "latency")  # families whose figures are set against each other as B / A

# what an outcome rests on
NOT_FINITE = "not finite"
EQUAL_LOSSES = "equal losses"  # every token's, so that the figure made of them must be equal too
PAIRED_LOSSES = "paired losses"
THIS_TEXT = "this text"  # paired too: beyond what is tolerated on this very text, whatever the windows say
VALUES = "values"  # the losses are not there to pair
RATIO = "ratio"  # of each side to the reference of its own session
TURNS = "turns"  # times that both sides took in turn in one session, paired block by block
FIGURE = "figure"


class Obstacle(NamedTuple):
    """What forbids a comparison: a field with its value before and now, or a whole sentence and nothing behind it."""

    field: str
    before: Any
    now: Any = None


def obstacle(question: Question, before: Row | Recorded) -> Obstacle | None:
    """The first field that forbids the comparison; None where nothing does. An exact fact holds everywhere."""
    row, member = question.row, question.member
    if member.exact:
        return None
    fields = ["reference"] if member.paired or member.timed else []
    for field in (*fields, "protocol_id", "token_hash", "unit"):
        old, new = (FILE_NAME.sub("text: revision ", getattr(side, field)) for side in (before, row))
        if old != new:
            return Obstacle(field, getattr(before, field), getattr(row, field))
    lengths = [name for name in LENGTHS if name in before.detail and name in row.detail]
    for name in lengths if member.timed else ():
        if before.detail[name] != row.detail[name]:
            return Obstacle(f"detail.{name}", before.detail[name], row.detail[name])
    early = [side for side in (row, before) if isinstance(side, Row) and side.stopped_early]
    if early and (len(early) == 1 or row.detail["tokens_used"] != before.detail["tokens_used"]):
        return Obstacle("stopped", stopped(early[0]))
    if lasts(row, timed=member.timed) and min(before.count, row.count) > 1 and before.count != row.count:
        return Obstacle("count", before.count, row.count)
    return _other_world(question, before)


def lasts(row: Row, *, timed: bool) -> bool:
    """Whether the figure is one of losses, which are carried over a device class."""
    return bool(row.dataset) and not timed


def _other_world(question: Question, before: Row | Recorded) -> Obstacle | None:
    """Other weights or another environment than the record's, where they may not differ."""
    row, timed, world = question.row, question.member.timed, question.environment
    if world is None or not isinstance(before, Recorded):
        return None
    lasting = lasts(row, timed=timed)
    if lasting and before.revision != row.revision:
        return Obstacle("revision", before.revision, row.revision)
    if not before.carries:
        return Obstacle("environment", before.difference)
    if not lasting and (changed_class := class_difference(before.environment, world)):
        return Obstacle("environment", changed_class)
    if timed and before.environment.machine != world.machine:
        return Obstacle("machine", before.environment.machine, world.machine)
    return None


def outcome(question: Question, before: Row | Recorded, then: float, now: float) -> Outcome:
    """What the change of a figure from `then` to `now` is called, in its unit; the first rule that applies decides."""
    if question.row.case.family == "perplexity":
        return _loss(question, before, then, now)
    return _time(question, before) if question.member.timed else _figure(question, before, then, now)


def equal(then: float, now: float) -> bool:
    """Equal to the ten digits that a record keeps, or both not a number."""
    return bool(rounded(then) == rounded(now)) or (math.isnan(then) and math.isnan(now))


def _not_finite(row: Row, before: Row | Recorded, then: float, now: float) -> Outcome | None:
    """What a figure means that is not finite; None where both are. One by the reference's fault decides nothing."""
    lost = [side for side, value in ((before, then), (row, now)) if not sound(side, value)]
    if not lost:
        return None
    others = any(side.detail.get("reference_non_finite") and not side.detail.get("non_finite") for side in lost)
    verdict = Verdict.WORSE if lost == [row] else Verdict.BETTER
    return Outcome(Verdict.UNUSABLE if others or len(lost) == 2 else verdict, ground=NOT_FINITE)


def sound(side: Row | Recorded, value: float) -> bool:
    """Whether a figure and the losses that it is made of are finite."""
    return math.isfinite(value) and not side.detail.get("non_finite") and not side.detail.get("reference_non_finite")


def same_losses(question: Question, before: Row | Recorded) -> bool:
    """Whether every token's loss is the one before, and of a paired figure every loss of the reference too."""
    row = question.row
    if not row.nll or row.nll != before.nll:
        return False
    ours, theirs = row.detail.get("reference_nll"), before.detail.get("reference_nll")
    if not question.member.paired or ours:
        return not question.member.paired or bool(ours == theirs)
    return row.value is not None and before.value is not None and equal(before.value, row.value)


def _loss(question: Question, before: Row | Recorded, then: float, now: float) -> Outcome:
    """Perplexity in all its forms, and the paired loss: paired over windows with the losses before, in nats."""
    floor, row = question.floor, question.row
    if same_losses(question, before):
        alike = equal(then, now) or math.isclose(then, now, rel_tol=SUM_DIGITS, abs_tol=SUM_DIGITS)
        moved = Verdict.WORSE if now > then else Verdict.BETTER
        return Outcome(Verdict.SAME if alike else moved, floor=floor, ground=EQUAL_LOSSES)
    if unsound := _not_finite(row, before, then, now):
        return unsound
    change = paired_change(question, before) if question.member.paired else own_change(question, before)
    if change is None:
        shift = value_change(row.metric, then, now)
        near = equal(then, now) or (shift is not None and abs(shift) <= floor)
        return Outcome(Verdict.WITHIN_NOISE if near else Verdict.UNUSABLE, floor=floor, ground=VALUES)
    verdict = decide(change, floor, question.tests, question.room)
    p = error_rate.p_loss(change, floor) if change.usable else None
    by_text = verdict in MOVED and (p is None or p > error_rate.level(question.tests))
    return Outcome(verdict, change=change, floor=floor, p=p, ground=THIS_TEXT if by_text else PAIRED_LOSSES)


def decide(change: Estimate, floor: float, tests: int = 1, room: float = math.inf) -> Verdict:
    """A loss's change in nats against what is noise, and on this very text against what is tolerated.

    *Text like this*: it moved where its share of the error rate rejects that it is within the floor.
    *This text*: the change is exact, so that one beyond `room` moved, however windows differ (a fault that meets one
    window of many has no interval that shows it). Without a usable interval only what is beneath the floor is decided.
    """
    moved = Verdict.WORSE if change.value > 0 else Verdict.BETTER
    if abs(change.value) > max(room, floor):
        return moved
    if not change.usable:
        return Verdict.WITHIN_NOISE if abs(change.value) <= floor else Verdict.UNUSABLE
    return moved if error_rate.p_loss(change, floor) <= error_rate.level(tests) else Verdict.WITHIN_NOISE


def value_change(metric: str, then: float, now: float) -> float | None:
    """ln(now / then) for perplexity, bytes and times, else now - then; None where it cannot be had.

    perplexity.delta is a log ratio already, so that its difference is one.
    """
    finite = math.isfinite(then) and math.isfinite(now)
    if metric == "perplexity.delta" or metric.partition(".")[0] not in RATIOS:
        return now - then if finite else None
    if finite and then > 0 and now > 0:
        return math.log(now / then)
    return 0.0 if equal(then, now) else None


def own_change(question: Question, before: Row | Recorded) -> Estimate | None:
    """This model's losses now minus then; None where either is not there."""
    return _paired(question, question.losses(question.row.nll), question.losses(before.nll))


def reference_change(question: Question, before: Row | Recorded) -> Estimate | None:
    """The reference's losses now minus then; None where either is not there, or they are the same."""
    now, then = question.row.detail.get("reference_nll"), before.detail.get("reference_nll")
    return None if now == then else _paired(question, question.losses(now), question.losses(then))


def paired_change(question: Question, before: Row | Recorded) -> Estimate | None:
    """The loss against the reference now minus then, token by token; None where one of the four is not there."""
    sides = (question.row, before)
    ours, theirs = (question.losses(side.nll) for side in sides)
    reference, reference_before = (question.losses(side.detail.get("reference_nll")) for side in sides)
    if ours is None or reference is None or theirs is None or reference_before is None:
        return None
    return _paired(question, ours - reference, theirs - reference_before)


def _paired(question: Question, now: NDArray[Any] | None, then: NDArray[Any] | None) -> Estimate | None:
    if now is None or then is None:
        return None
    change = paired_delta(now, then, question.row.windows)
    return change if math.isfinite(change.value) else None


def _time(question: Question, before: Row | Recorded) -> Outcome:
    """A time by its log ratio to the reference of its own session, or, taken in turn, block by block.

    Too wide to decide is an interval that is wider than the limit on both sides of zero.
    """
    row = question.row
    if isinstance(before, Row) and in_turn(row, before):
        ground, change = TURNS, _over_blocks(row, before)
    else:
        ground, change = RATIO, _ratio_change(row, before)
    floors = (number(side.detail.get("aa_floor")) or 0.0 for side in (row, before))
    limit = max(*floors, question.floor, math.log(question.allowance))
    if change is None or not change.usable:
        return Outcome(Verdict.UNUSABLE, change=change, floor=limit, ground=ground)
    p = error_rate.p_time(change, limit)
    moved = Verdict.WORSE if change.value > 0 else Verdict.BETTER
    if p <= error_rate.level(question.tests):
        verdict = moved
    else:
        verdict = Verdict.UNUSABLE if change.high - change.low > 2 * limit else Verdict.WITHIN_NOISE
    return Outcome(verdict, change=change, floor=limit, p=p, ground=ground)


def in_turn(row: Row, before: Row) -> bool:
    """Whether both sides took their times in turn, in one session."""
    return bool(row.detail.get("turns")) and row.detail["turns"] == before.detail.get("turns")


def _over_blocks(row: Row, before: Row) -> Estimate | None:
    """ln(now / then) over blocks; None where the sides have not equally many repetitions."""
    if len(row.samples) != len(before.samples) or not row.samples:
        return None
    return hodges_lehmann_ratio(row.samples, before.samples)


def _ratio_change(row: Row, before: Row | Recorded) -> Estimate | None:
    """The log ratio to the reference now minus then, their independent intervals added in quadrature."""
    now, then = log_ratio(row.detail), log_ratio(before.detail)
    if now is None or then is None:
        return None
    change = now.value - then.value
    low = change - math.hypot(now.value - now.low, then.high - then.value)
    high = change + math.hypot(now.high - now.value, then.value - then.low)
    return Estimate(change, low, high, row.count, True)


def log_ratio(detail: Mapping[str, Any]) -> Estimate | None:
    """A timing's log ratio to the reference with its interval; None where there is no interval to decide by."""
    value, low, high = (number(detail.get(f"log_ratio{end}")) for end in ("", "_low", "_high"))
    if value is None or low is None or high is None or detail.get("log_ratio_usable") is False:
        return None
    return Estimate(value, low, high, 0, True)


def number(value: Any) -> float | None:
    """A finite number of a row's detail, or None."""
    value = decode_number(value)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _figure(question: Question, before: Row | Recorded, then: float, now: float) -> Outcome:
    """A figure without pairs: beyond its allowance or floor, whichever is wider, it moved; an exact fact by anything.

    Where no direction is better, what moved is worse: somebody must look at it.
    """
    member = question.member
    limit = 0.0 if member.exact else max(question.floor, abs(then) * (question.allowance - 1))
    if equal(then, now):
        return Outcome(Verdict.SAME, floor=limit, ground=FIGURE)
    if unsound := _not_finite(question.row, before, then, now):
        return unsound
    if abs(now - then) <= limit:
        return Outcome(Verdict.WITHIN_NOISE, floor=limit, ground=FIGURE)
    better = member.better == ("lower" if now < then else "higher")
    return Outcome(Verdict.BETTER if better else Verdict.WORSE, floor=limit, ground=FIGURE)
