"""The rules that hold a figure against an earlier one: what forbids it, and what its change is called. No torch.

The earlier figure is a record or a row of an earlier report; a record is a row with fewer fields. The rules are the
same for both, but for two things that the question says: how many tests share its error rate, and whether environments
and weights may differ. They give no reasons: `verdicts` and `two_reports` say in their own words what was found.

At most 5% of sessions in which nothing changed raise an alarm: every statistical verdict of a session is one test of
one family. Of m tests each is decided at once at 0.05 / m (Bonferroni), since a case's test ends before the session
does; at the session's end Holm's step-down over those against the record (`settle`) may only add to what was rejected.
What is exact (bytes, census, token hashes, a figure on the very text that was read) is no test: it cannot be wrong by
chance.

A change's p value is two-sided for |true change| <= floor: for losses Student's t over windows, for times the normal
limit of the interval that was combined from both sessions (`tests/judge/test_error_rate.py` holds both to SciPy).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.core.catalog import member_of
from harness.core.contracts import Member
from harness.core.environment import Environment, class_difference, waiting_difference
from harness.core.records import Case, Row, Verdict
from harness.core.stats import (
    CONFIDENCE,
    Estimate,
    hodges_lehmann_ratio,
    holm,
    paired_delta,
    student_coverage,
    student_quantile,
)
from harness.core.values import decode_number
from harness.judge.baselines import Recorded, lasts, rounded
from harness.judge.bounds import Bounds

Losses = Callable[[str], NDArray[np.float32] | None]  # per-token NLL, nats, by its sha; None where nobody has it

ALPHA = 1 - CONFIDENCE  # of a whole session
RELIABLY = 0.9  # an effect is seen reliably where nine of ten sessions would call it
NORMAL = NormalDist()
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


@dataclass(frozen=True)
class Outcome:
    """One comparison's answer; `verdict` None where nothing is promised. `change` is in nats or the figure's unit."""

    verdict: Verdict | None
    reason: str = ""
    change: Estimate | None = None
    floor: float = 0.0  # a change up to here is noise
    p: float | None = None  # of the change, where it was tested
    smallest: str = ""  # effect that this comparison could have seen, in words
    ground: str = ""  # what it rests on, a word of `rules`


@dataclass(frozen=True)
class Question:
    """Everything that one comparison with what stood before looks at."""

    row: Row
    member: Member
    bounds: Bounds
    before: Row | Recorded
    nll: Losses  # of both
    environment: Environment | None = None  # the row's own; None where environments and weights may differ
    tests: int = 1  # statistical tests that share one error rate

    @property
    def floor(self) -> float:
        """The larger of the bound's noise floor and the recorded one, nats (or the figure's unit)."""
        recorded = self.before.floor if isinstance(self.before, Recorded) else None
        return max(self.bounds.floor(self.row.case), recorded or 0.0)

    @property
    def allowance(self) -> float:
        """The ratio to the figure before up to which the bounds tolerate a change, at least 1."""
        return self.bounds.allowance(self.row.case)

    @property
    def room(self) -> float:
        """The change on this very text beyond which it moved, nats; infinite where no rule speaks."""
        return math.log(self.allowance) if self.allowance > 1 else math.inf

    def losses(self, sha: Any) -> NDArray[np.float64] | None:
        """Losses by sha in float64; None where there is no sha or no file, or they are not those of the windows."""
        values = self.nll(sha) if isinstance(sha, str) and sha else None
        windows = self.row.windows
        if values is None or not windows or len(values) != windows[-1].stop:
            return None
        return values.astype(np.float64)


def read(row: Row) -> str:
    """How much of its text an early-stopped case read: '4,088 of 75,530 tokens'."""
    return f"{row.detail['tokens_used']:,} of {row.detail['tokens_available']:,} tokens"


def stopped(row: Row) -> str:
    """Why an early-stopped case has no figure to compare."""
    return f"stopped early ({row.detail['decided']}) after {read(row)}: no whole-text figure"


class Obstacle(NamedTuple):
    """What forbids a comparison: a field with its value before and now, or a whole sentence and nothing behind it."""

    field: str
    before: Any
    now: Any = None


def obstacle(question: Question) -> Obstacle | None:
    """The first field that forbids the comparison; None where nothing does. An exact fact holds everywhere."""
    row, member, before = question.row, question.member, question.before
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
    lasting = lasts(row, timed=member.timed)
    if lasting and min(before.count, row.count) > 1 and before.count != row.count:
        return Obstacle("count", before.count, row.count)
    return _other_world(question, lasting)


def _other_world(question: Question, lasting: bool) -> Obstacle | None:
    """Other weights or another environment than the record's, where they may not differ."""
    row, before, world = question.row, question.before, question.environment
    if world is None or not isinstance(before, Recorded):
        return None
    if lasting and before.revision != row.revision:
        return Obstacle("revision", before.revision, row.revision)
    if not before.carries:
        return Obstacle("environment", before.difference)
    if not lasting and (changed_class := class_difference(before.environment, world)):
        return Obstacle("environment", changed_class)
    if question.member.timed and (waits := waiting_difference(before.environment, world)):
        return Obstacle("environment", waits)
    if question.member.timed and before.environment.machine != world.machine:
        return Obstacle("machine", before.environment.machine, world.machine)
    return None


def outcome(question: Question, then: float, now: float) -> Outcome:
    """What the change of a figure from `then` to `now` is called, in its unit; the first rule that applies decides."""
    if question.row.case.family == "perplexity":
        return _loss(question, then, now)
    return _time(question) if question.member.timed else _figure(question, then, now)


def equal(then: float, now: float) -> bool:
    """Equal to the ten digits that a record keeps, or both not a number."""
    return bool(rounded(then) == rounded(now)) or (math.isnan(then) and math.isnan(now))


def _not_finite(question: Question, then: float, now: float) -> Outcome | None:
    """What a figure means that is not finite; None where both are. One by the reference's fault decides nothing."""
    lost = [side for side, value in ((question.before, then), (question.row, now)) if not sound(side, value)]
    if not lost:
        return None
    others = any(side.detail.get("reference_non_finite") and not side.detail.get("non_finite") for side in lost)
    verdict = Verdict.WORSE if lost == [question.row] else Verdict.BETTER
    return Outcome(Verdict.UNUSABLE if others or len(lost) == 2 else verdict, ground=NOT_FINITE)


def sound(side: Row | Recorded, value: float) -> bool:
    """Whether a figure and the losses that it is made of are finite."""
    return math.isfinite(value) and not side.detail.get("non_finite") and not side.detail.get("reference_non_finite")


def _loss(question: Question, then: float, now: float) -> Outcome:
    """Perplexity in all its forms, and the paired loss: paired over windows with the losses before, in nats."""
    floor, row, before, paired = question.floor, question.row, question.before, question.member.paired
    same_losses = bool(row.nll) and row.nll == before.nll
    if same_losses and paired:
        reference, reference_before = (side.detail.get("reference_nll") for side in (row, before))
        same_losses = reference == reference_before if reference else equal(then, now)
    if same_losses:
        alike = equal(then, now) or math.isclose(then, now, rel_tol=SUM_DIGITS, abs_tol=SUM_DIGITS)
        moved = Verdict.WORSE if now > then else Verdict.BETTER
        return Outcome(Verdict.SAME if alike else moved, floor=floor, ground=EQUAL_LOSSES)
    if unsound := _not_finite(question, then, now):
        return unsound
    if paired:
        change = paired_change(question)
    else:
        change = _paired(question, question.losses(row.nll), question.losses(before.nll))
    if change is None:
        shift = value_change(row.metric, then, now)
        near = equal(then, now) or (shift is not None and abs(shift) <= floor)
        return Outcome(Verdict.WITHIN_NOISE if near else Verdict.UNUSABLE, floor=floor, ground=VALUES)
    verdict = decide(change, floor, question.tests, question.room)
    p = p_loss(change, floor) if change.usable else None
    by_text = verdict in MOVED and (p is None or p > level(question.tests))
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
    return moved if p_loss(change, floor) <= level(tests) else Verdict.WITHIN_NOISE


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


def reference_change(question: Question) -> Estimate | None:
    """The reference's losses now minus then; None where either is not there, or they are the same."""
    now, then = question.row.detail.get("reference_nll"), question.before.detail.get("reference_nll")
    return None if now == then else _paired(question, question.losses(now), question.losses(then))


def paired_change(question: Question) -> Estimate | None:
    """The loss against the reference now minus then, token by token; None where one of the four is not there."""
    sides = (question.row, question.before)
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


def _time(question: Question) -> Outcome:
    """A time by its log ratio to the reference of its own session, or, taken in turn, block by block.

    Too wide to decide is an interval that is wider than the limit on both sides of zero.
    """
    row, before, change = question.row, question.before, None
    ground = TURNS if isinstance(before, Row) and in_turn(row, before) else RATIO
    if isinstance(before, Row) and ground == TURNS:
        if row.samples and len(row.samples) == len(before.samples):
            change = hodges_lehmann_ratio(row.samples, before.samples)
    elif (now := log_ratio(row.detail)) and (then := log_ratio(before.detail)):
        value = now.value - then.value  # the sessions' independent intervals are added in quadrature
        low = value - math.hypot(now.value - now.low, then.high - then.value)
        high = value + math.hypot(now.high - now.value, then.value - then.low)
        change = Estimate(value, low, high, row.count, True)
    floors = (number(side.detail.get("aa_floor")) or 0.0 for side in (row, before))
    limit = max(*floors, question.floor, math.log(question.allowance))
    crowded = row.detail.get("crowded") or before.detail.get("crowded")
    if change is None or not change.usable or crowded:
        return Outcome(Verdict.UNUSABLE, change=change, floor=limit, ground=ground)
    p = p_time(change, limit)
    if p <= level(question.tests):
        verdict = Verdict.WORSE if change.value > 0 else Verdict.BETTER
    else:
        verdict = Verdict.UNUSABLE if change.high - change.low > 2 * limit else Verdict.WITHIN_NOISE
    return Outcome(verdict, change=change, floor=limit, p=p, ground=ground)


def in_turn(row: Row, before: Row) -> bool:
    """Whether both sides took their times in turn, in one session."""
    return bool(row.detail.get("turns")) and row.detail["turns"] == before.detail.get("turns")


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


def _figure(question: Question, then: float, now: float) -> Outcome:
    """A figure without pairs: beyond its allowance or floor, whichever is wider, it moved; an exact fact by anything.

    Where no direction is better, what moved is worse: somebody must look at it.
    """
    member = question.member
    limit = 0.0 if member.exact else max(question.floor, abs(then) * (question.allowance - 1))
    if equal(then, now):
        return Outcome(Verdict.SAME, floor=limit, ground=FIGURE)
    if unsound := _not_finite(question, then, now):
        return unsound
    if abs(now - then) <= limit:
        return Outcome(Verdict.WITHIN_NOISE, floor=limit, ground=FIGURE)
    better = member.better == ("lower" if now < then else "higher")
    return Outcome(Verdict.BETTER if better else Verdict.WORSE, floor=limit, ground=FIGURE)


# the error rate of a session


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
    tested = []
    for place, row in enumerate(rows):
        change = row.detail.get("change")
        p = decode_number(change.get("p")) if isinstance(change, dict) and row.value is not None else None
        if p is not None:
            tested.append((place, float(p)))
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
