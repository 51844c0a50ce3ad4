"""The rules that hold a figure against an earlier one: what forbids it, and what its change is called. No torch.

The earlier figure is a record or a row of an earlier report; a record is a row with fewer fields. The rules are the
same for both, but that between two reports environments and the model's revision may differ. They give no reasons but
for what may not be compared: `verdicts` and `two_reports` say in their own words what was found.

**Losses on the same tokens** are judged by what moves where nothing but threads, kernels and the like changed: the
noise of the bounds, by what products are computed in. Of n per-token changes, in nats,

- the mean is exact on this text. It moved where Student's t rejects that it is within the floor (0 but where a bound
  says otherwise), with variance sd^2 / n + shift^2: sd of the changes, shift that of whole runs;
- the root mean square may be FACTOR times the recorded one. This is no test: an edited config moves fp32 tokens by a
  hundred times that. Beyond it somebody must look, whatever the mean does, and so it is `worse`.

Where losses are not there to subtract, the mean's change is as exact from the two values; then sd is the table's.

**The error rate.** At most 5% of sessions in which nothing changed raise an alarm: every statistical verdict of a
session is one test of one family. Of m tests each is decided at once at 0.05 / m (Bonferroni), since a case's test ends
before the session does; at the session's end Holm's step-down over those against the record (`settle`) may only add to
what was rejected. What is exact (bytes, census, token hashes, a figure made of equal losses) is no test: it cannot be
wrong by chance.

One model's losses on one text are one test, however many figures are made of them. A perplexity in all its forms asks
whether they moved. A paired loss asks whether they moved against the reference's; it is called only where, at the same
level, the losses moved or the reference's did, and the reference's losses are among the tests counted. So where nothing
changed it adds no alarm to those of the two. Where the recorded losses of either are not there, nobody can ask that: it
is called by its value alone, and is one test more.

A time's p value is the normal limit of the interval that was combined from both sessions. `tests/judge` holds all to
SciPy.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.core.catalog import member_of
from harness.core.contracts import Member
from harness.core.environment import Environment, class_difference, waiting_difference
from harness.core.identity import changed_facts
from harness.core.records import Case, Row, Verdict
from harness.core.stats import (
    CONFIDENCE,
    Estimate,
    degrees,
    hodges_lehmann_ratio,
    holm,
    student_coverage,
    student_mean,
    student_quantile,
)
from harness.core.values import decode_number
from harness.judge.baselines import Recorded, lasts, rounded, token_limit
from harness.judge.bounds import Bounds, Ran, ran

Losses = Callable[[str], NDArray[np.float32] | None]  # per-token NLL, nats, by its sha; None where nobody has it
Identities = Callable[[str], Mapping[str, str] | None]  # a model's facts by their digest; None where nobody has them

ALPHA = 1 - CONFIDENCE  # of a whole session
RELIABLY = 0.9  # an effect is seen reliably where nine of ten sessions would call it
FACTOR = 3.0  # times the recorded run-to-run change that tokens may move by
WIDE = math.log(1.5)  # half of an interval that cannot tell whether a time grew by half
EDITED = 1e-6  # nats a token: a record keeps ten digits, and a sum in another order moves the last of sixteen
NORMAL = NormalDist()
MOVED = frozenset({Verdict.WORSE, Verdict.BETTER})
# a file's text is named by the revision, a sha256 of its content: where it lies is provenance, no protocol
FILE_NAME = re.compile(r"^text: (?:text|text-raw|package):[^;]*?, revision ")
LENGTHS = ("prompt_tokens", "new_tokens")  # of a timing's detail; a record keeps none
SUM_DIGITS = 1e-8  # a record keeps ten digits; a sum in another order moves the last of a double's sixteen
RATIOS = ("perplexity", "memory", "latency")  # families whose figures are set against each other as B / A
LOSS = "perplexity"  # the family whose figures are made of per-token losses
BRIEF = 12  # characters of a hash that tell it from another in a line
NAMED = 5  # changed facts of a model in one line

# what an outcome rests on
NOT_FINITE = "not finite"
EQUAL_LOSSES = "equal losses"  # every token's, so that the figure made of them must be equal too
PAIRED_LOSSES = "paired losses"
TOKENS = "tokens"  # they moved beyond rounding, and their mean did not
THIS_TEXT = "this text"  # beyond what a user's bounds tolerate on this very text, whatever the noise
VALUES = "values"  # the losses are not there to pair; the two values are
EDITED_RECORD = "edited record"  # its value does not follow from its own losses
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
    rms: float | None = None  # of the tokens' changes, nats, where they were paired
    rms_limit: float = math.inf  # up to here they are noise
    smallest: str = ""  # effect that this comparison could have seen, in words
    ground: str = ""  # what it rests on, a word of `rules`


def unknown_identity(digest: str) -> None:
    """Where nobody knows a model's facts."""


@dataclass(frozen=True)
class Question:
    """Everything that one comparison with what stood before looks at."""

    row: Row
    member: Member
    bounds: Bounds
    before: Row | Recorded
    nll: Losses  # of both
    environment: Environment | None = None  # the row's own
    tests: int = 1  # statistical tests that share one error rate
    identities: Identities = unknown_identity  # of both
    environment_before: Environment | None = None  # of an earlier row; a record brings its own

    def runs(self, case: Case, *method_ids: str) -> list[Ran]:
        """What the case ran in, now and before."""
        before = self.before.environment if isinstance(self.before, Recorded) else self.environment_before
        ids = method_ids or (self.row.method_id, self.before.method_id)
        return [ran(case, name, world) for name, world in zip(ids, (self.environment, before), strict=True)]

    @property
    def floor(self) -> float:
        """The noise floor of the bounds, whatever a record says of its own; nats or the figure's unit."""
        case = self.row.case
        return max(self.bounds.floor(case, run) for run in self.runs(case))

    @property
    def allowance(self) -> float:
        """The ratio to the figure before up to which the bounds tolerate a change, at least 1."""
        return max(self.bounds.allowance(self.row.case, run) for run in self.runs(self.row.case))

    @property
    def room(self) -> float:
        """The change on this very text beyond which it moved, nats; infinite where no rule speaks."""
        return math.log(self.allowance) if self.allowance > 1 else math.inf

    def noise(self, *, of_reference: bool = False) -> tuple[float, float]:
        """Nats that the candidate's or the reference's tokens and their mean move by: those of the noisier side."""
        case = self.row.case._replace(method=self.row.reference) if of_reference else self.row.case
        found = [self.bounds.noise(case, run) for run in self.runs(case, *(("", "") if of_reference else ()))]
        return max(token for token, _ in found), max(shift for _, shift in found)

    def losses(self, sha: Any) -> NDArray[np.float64] | None:
        """Losses by sha in float64; None where there is no sha or no file, or they are not those of the windows."""
        if not isinstance(sha, str) or not sha:
            return None
        if sha not in self._held:
            values, windows = self.nll(sha), self.row.windows
            fits = values is not None and windows and len(values) == windows[-1].stop
            self._held[sha] = values.astype(np.float64) if values is not None and fits else None
        return self._held[sha]

    @functools.cached_property
    def _held(self) -> dict[str, NDArray[np.float64] | None]:
        """Losses that were read already."""
        return {}


def read(row: Row) -> str:
    """How much of its text an early-stopped case read: '4,088 of 75,530 tokens'."""
    return f"{row.detail['tokens_used']:,} of {row.detail['tokens_available']:,} tokens"


def stopped(row: Row) -> str:
    """Why an early-stopped case has no figure to compare."""
    return f"stopped early ({row.detail['decided']}) after {read(row)}: no whole-text figure"


class Obstacle(NamedTuple):
    """What forbids a comparison: `input changed` or `not comparable`, and every field with its value before and now."""

    verdict: Verdict
    text: str


def obstacle(question: Question) -> Obstacle | None:
    """Why the figures may not be compared; None where they may. An exact fact holds in every environment."""
    if lines := [*changed_model(question), *changed_text(question)]:
        return Obstacle(Verdict.INPUT_CHANGED, "; ".join(lines))
    text = None if question.member.exact else _incomparable(question)
    return Obstacle(Verdict.NOT_COMPARABLE, text) if text else None


def changed_model(question: Question) -> list[str]:
    """What a model's identity was and is, fact by fact; of figures without one, the revision of its weights. Then the
    same of another model that is the reference.

    Between two reports another revision is what was asked about.
    """
    then, now = (str(side.detail.get("reference_identity", "")) for side in (question.before, question.row))
    lines = _changed_facts(question, then, now) if then and now else []
    return [*_changed_weights(question), *(f"of the reference, {line}" for line in lines)]


def _changed_weights(question: Question) -> list[str]:
    row, before = question.row, question.before
    other = bool(row.revision and before.revision and row.revision != before.revision)
    weights = [f"weights: revision {before.revision[:BRIEF]} -> {row.revision[:BRIEF]}"] if other else []
    if not (row.identity and before.identity):
        return weights if isinstance(before, Recorded) else []
    if row.identity == before.identity or (other and isinstance(before, Row)):
        return []
    return _changed_facts(question, before.identity, row.identity, weights)


def _changed_facts(question: Question, then: str, now: str, weights: Sequence[str] = ()) -> list[str]:
    """How two identities differ, fact by fact; by `weights` or their digests where nobody knows the facts."""
    before, after = question.identities(then), question.identities(now)
    lines = changed_facts(before, after) if before and after else []
    if then == now or (before and after and not lines):  # only which values are defaults differs, as from one
        return []  # transformers to the next
    more = [f"and {len(lines) - NAMED} more"] if len(lines) > NAMED else []
    return [*lines[:NAMED], *more] or [*weights] or [f"identity: {then[:BRIEF]} -> {now[:BRIEF]}"]


def changed_text(question: Question) -> list[str]:
    """What was fed and scored before and now, line by line where it differs; another limit of tokens is none of it."""
    row, before = question.row, question.before
    if question.member.exact or token_limit(row.protocol_id) != token_limit(before.protocol_id):
        return []
    lines = []
    old, new = (FILE_NAME.sub("text: revision ", side.protocol_id) for side in (before, row))
    if old != new:
        parts = zip(old.split("; "), new.split("; "), strict=False)
        changed = [f"{then} -> {now}" for then, now in parts if then != now]
        lines.append(f"protocol id: {', '.join(changed) or f'{old} -> {new}'}")
    if row.token_hash != before.token_hash:
        lines.append(f"token hash: {before.token_hash[:BRIEF]} -> {row.token_hash[:BRIEF]}")
    counted = lasts(row, timed=question.member.timed) and not early(question) and min(before.count, row.count) > 1
    if counted and before.count != row.count:
        kind = "windows" if question.member.paired and row.case.family == LOSS else "tokens"
        lines.append(f"count of {kind} scored: {before.count} -> {row.count}")
    return lines


def early(question: Question) -> list[Row]:
    """The sides that were stopped early."""
    return [side for side in (question.row, question.before) if isinstance(side, Row) and side.stopped_early]


def _incomparable(question: Question) -> str:
    """The first field that forbids the comparison though the input is the same; '' where none does."""
    row, member, before, world = question.row, question.member, question.before, question.environment
    fields = [name for name in ("reference", "unit") if name == "unit" or member.paired or member.timed]
    sides: list[tuple[str, Any, Any]] = [(name, getattr(before, name), getattr(row, name)) for name in fields]
    sides.append(("limit", token_limit(before.protocol_id), token_limit(row.protocol_id)))
    if member.timed:
        named = [name for name in LENGTHS if name in before.detail and name in row.detail]
        sides += [(name, before.detail[name], row.detail[name]) for name in named]
    for name, old, new in sides:
        if old != new:
            return f"{name}: {old} -> {new}"
    parts = early(question)
    if parts and (len(parts) == 1 or row.detail["tokens_used"] != before.detail["tokens_used"]):
        return stopped(parts[0])
    if world is None or not isinstance(before, Recorded):
        return ""
    if not before.carries:
        return before.difference
    if not lasts(row, timed=member.timed) and (changed_class := class_difference(before.environment, world)):
        return changed_class
    if member.timed and (waits := waiting_difference(before.environment, world)):
        return waits
    if member.timed and before.environment.machine != world.machine:
        return f"machine: {before.environment.machine} -> {world.machine}"
    return ""


def outcome(question: Question, then: float, now: float) -> Outcome:
    """What the change of a figure from `then` to `now` is called, in its unit; the first rule that applies decides."""
    if question.row.case.family == LOSS:
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


# losses


class LossChange(NamedTuple):
    """One model's losses now minus then: (scored tokens,) nats, and what they move by from run to run."""

    change: NDArray[np.float64]
    token: float = 0.0
    shift: float = 0.0

    @property
    def mean(self) -> Estimate:
        """The mean change, with the interval of its test."""
        count = len(self.change)
        spread = float(self.change.std(ddof=1)) if count > 1 else self.token
        return student_mean(float(self.change.mean()), math.hypot(spread / math.sqrt(count), self.shift), count)

    def against(self, reference: LossChange) -> LossChange:
        """What the loss against the reference moved by."""
        noise = math.hypot(self.token, reference.token), math.hypot(self.shift, reference.shift)
        return LossChange(self.change - reference.change, *noise)


def loss_change(question: Question, *, of_reference: bool = False) -> LossChange | None:
    """How the candidate's or the reference's losses moved; None where they are not there, or not finite, to subtract.

    Losses of one name are the same, whether their file is there or not.
    """
    row, before = question.row, question.before
    now, then = (side.detail.get("reference_nll") if of_reference else side.nll for side in (row, before))
    if now and now == then and row.windows:
        return LossChange(np.zeros(row.windows[-1].stop))
    ours, theirs = question.losses(now), question.losses(then)
    if ours is None or theirs is None or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return None
    return LossChange(ours - theirs, *question.noise(of_reference=of_reference))


def _loss(question: Question, then: float, now: float) -> Outcome:
    """Perplexity in all its forms, and the paired loss, in nats a token: by tokens, or else by the two values."""
    row, before, paired, floor = question.row, question.before, question.member.paired, question.floor
    same_losses = bool(row.nll) and row.nll == before.nll
    if same_losses and paired:
        theirs, theirs_before = (side.detail.get("reference_nll") for side in (row, before))
        same_losses = theirs == theirs_before if theirs else equal(then, now)
    if same_losses:
        alike = equal(then, now) or math.isclose(then, now, rel_tol=SUM_DIGITS, abs_tol=SUM_DIGITS)
        if not alike and math.isfinite(then) and ((told := nats(row, then)) is None or edited(question, told)):
            return Outcome(Verdict.WORSE, floor=floor, ground=EDITED_RECORD)
        moved = Verdict.WORSE if now > then else Verdict.BETTER
        return Outcome(Verdict.SAME if alike else moved, floor=floor, ground=EQUAL_LOSSES)
    if unsound := _not_finite(question, then, now):
        return unsound
    at_first, at_last = nats(row, then), nats(row, now)
    if at_first is None or at_last is None or edited(question, at_first):
        return Outcome(Verdict.WORSE, floor=floor, ground=EDITED_RECORD)
    own, reference = loss_change(question), loss_change(question, of_reference=True) if paired else None
    if own and (reference or not paired):
        return by_tokens(question, own, reference, tests=question.tests)
    token, shift = question.noise()
    if paired:
        others = reference[1:] if reference else question.noise(of_reference=True)
        token, shift = math.hypot(token, others[0]), math.hypot(shift, others[1])
    count = scored(row)
    change = student_mean(at_last - at_first, math.hypot(token / math.sqrt(count), shift), count)
    p = p_loss(change, floor)
    verdict = decide(change, floor, question.tests, question.room)
    return Outcome(verdict, change=change, floor=floor, p=p, ground=VALUES)


def by_tokens(question: Question, own: LossChange, reference: LossChange | None = None, *, tests: int = 1) -> Outcome:
    """What a change of losses is called, as one of so many tests; with a reference's, that of the loss against it."""
    floor, room = question.floor, question.room
    whole = own.against(reference) if reference else own
    change = whole.mean
    p = p_loss(change, floor)
    if reference and reference.change.any():
        p = max(p, min(p_loss(own.mean, floor), p_loss(reference.mean, floor)))
    rms, limit = float(np.sqrt(np.mean(whole.change**2))), max(FACTOR * whole.token, floor)
    verdict, ground = decide(change, floor, tests, room, p), PAIRED_LOSSES
    if verdict in MOVED and p > level(tests):
        ground = THIS_TEXT
    elif verdict not in MOVED and rms > limit and not _other_weights(question):
        verdict, ground = Verdict.WORSE, TOKENS
    return Outcome(verdict, change=change, floor=floor, p=p, rms=rms, rms_limit=limit, ground=ground)


def _other_weights(question: Question) -> bool:
    """Whether two reports are of other weights: then every token moved, and the mean alone says which way."""
    row, before = question.row, question.before
    same = row.revision == before.revision or (row.identity and row.identity == before.identity)
    return isinstance(before, Row) and not same


def decide(change: Estimate, floor: float, tests: int = 1, room: float = math.inf, p: float | None = None) -> Verdict:
    """A mean's change in nats: it moved where its share of the error rate rejects that it is within the floor.

    One beyond `room` moved whatever the noise: on this very text it is exact.
    """
    moved = Verdict.WORSE if change.value > 0 else Verdict.BETTER
    beyond = abs(change.value) > max(room, floor)
    return moved if beyond or (p_loss(change, floor) if p is None else p) <= level(tests) else Verdict.WITHIN_NOISE


def scored(row: Row) -> int:
    """How many tokens a loss was taken over, at least 1."""
    told = [row.detail.get("tokens_used"), row.detail.get("scored"), row.count]
    return row.windows[-1].stop if row.windows else int(next(filter(None, told), 1))


def nats(row: Row, value: float) -> float | None:
    """A finite figure of losses as nats a scored token, which a change and its own losses are held to; None below 0."""
    if row.metric == "perplexity.delta":
        return value
    units = number(row.detail.get("words")) or number(row.detail.get("bytes"))
    scale = units / scored(row) if units else 1.0
    if row.metric == "perplexity.bits_per_byte":
        return value * math.log(2) * scale
    return math.log(value) * scale if value > 0 else None


def edited(question: Question, recorded: float) -> bool:
    """Whether a recorded figure, in nats a token, does not follow from its own losses, where those are there."""
    before = question.before
    own = question.losses(before.nll) if isinstance(before, Recorded) else None
    if own is not None and question.member.paired:
        reference = question.losses(before.detail.get("reference_nll"))
        own = None if reference is None else own - reference
    if own is None:
        return False
    means = own.mean(), np.mean([own[window].mean() for window in question.row.windows])  # as protocols aggregate
    return all(abs(mean - recorded) > EDITED for mean in means)


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


# times and other figures


def _time(question: Question) -> Outcome:
    """A time by its log ratio to the reference of its own session, or, taken in turn, block by block.

    Too wide to decide is an interval that could hide half as much again, and more than the limit.
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
        wide = (change.high - change.low) / 2 > max(limit, WIDE)
        verdict = Verdict.UNUSABLE if wide else Verdict.WITHIN_NOISE
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


def tested(case: Case) -> tuple[Case, ...]:
    """What a case's test against the record is a test of: one model's losses on one text, or the case alone."""
    if case.family != LOSS:
        return (case,)
    own = case._replace(metric=LOSS, reference="")
    return (own, own._replace(method=case.reference)) if member_of(case).paired else (own,)


def tests(
    cases: Iterable[Case],
    bounds: Bounds,
    *,
    stop_early: bool,
    unpaired: Collection[Case] = (),  # noqa: PT028  this is no test of pytest's
) -> int:
    """How many statistical tests a session of these cases makes, at least 1.

    One model's losses on one text are one, held against their record; a paired loss that is read early is one more
    against its bound, where it has one, and one that has no losses to be paired with (`unpaired`) one more against its
    record. A time is one against its record, and one more where it has a bound against the reference.
    """
    count, against_records = 0, set[Case]()
    for case in cases:
        bounded = bounds.against_reference(case) is not None
        timed = member_of(case).timed
        if timed or case.family == LOSS:
            read_early = stop_early and case.metric == "perplexity.delta"
            count += bounded if timed or read_early else 0
            against_records |= set(tested(case))  # a paired loss that is not decided early is read whole, and tested
            against_records |= {case} if case in unpaired else set()
    return max(1, count + len(against_records))


def level(count: int) -> float:
    """The error probability that one of `count` tests may have."""
    return ALPHA / max(1, count)


def standard_error(change: Estimate) -> float:
    """Of a mean, from its interval; nats."""
    return (change.high - change.low) / 2 / student_quantile(CONFIDENCE, degrees(change.count))


def p_loss(change: Estimate, floor: float) -> float:
    """Two-sided p value that a loss's true change is within +-floor (nats): Student's t."""
    beyond, error = abs(change.value) - floor, standard_error(change)
    if beyond <= 0:
        return 1.0
    return max(0.0, 1 - student_coverage(beyond / error, degrees(change.count))) if error > 0 else 0.0


def p_time(change: Estimate, limit: float) -> float:
    """The same for a log ratio, from the half of its interval that faces zero, in the normal limit."""
    beyond = abs(change.value) - limit
    half = change.value - change.low if change.value > 0 else change.high - change.value
    if beyond <= 0:
        return 1.0
    return 2 * NORMAL.cdf(-beyond / (half / NORMAL.inv_cdf((1 + CONFIDENCE) / 2))) if half > 0 else 0.0


def smallest_loss(change: Estimate, floor: float, count: int) -> float:
    """The smallest true change, nats, that nine of ten sessions with this spread would have called."""
    free = degrees(change.count)
    quantiles = student_quantile(1 - level(count), free) + student_quantile(2 * RELIABLY - 1, free)
    return floor + quantiles * standard_error(change)


def smallest_time(change: Estimate, limit: float, count: int) -> float:
    """The same for a log ratio."""
    half = max(change.high - change.value, change.value - change.low)
    quantiles = NORMAL.inv_cdf(1 - level(count) / 2) + NORMAL.inv_cdf(RELIABLY)
    return limit + quantiles * half / NORMAL.inv_cdf((1 + CONFIDENCE) / 2)


def settle(rows: Sequence[Row], count: int) -> list[Row]:
    """Holm's step-down over a finished session's tests against the record.

    Of the figures of one model's losses on one text, the one with the smallest p value stands for them all, but for a
    paired loss that had no losses to be paired with.

    Args:
        rows: judged, one a case.
        count: of `tests`, those against a bound included: their share of the session's 5% is spent already.

    Returns:
        The rows; one that was `within noise` by itself and is rejected by Holm is `worse` or `better` now.
    """
    best: dict[Case, tuple[float, int]] = {}
    for place, row in enumerate(rows):
        change = row.detail.get("change")
        change = change if isinstance(change, dict) and row.value is not None else {}
        p = decode_number(change.get("p"))
        if p is not None:
            alone = member_of(row.case).paired and "rms" not in change  # by its value, without losses
            what = row.case if alone else tested(row.case)[0]
            best[what] = min(best.get(what, (math.inf, 0)), (float(p), place))
    adjusted = holm([p for p, _ in best.values()])
    budget = ALPHA * min(1.0, len(best) / max(1, count))
    settled = list(rows)
    for (p, place), value in zip(best.values(), adjusted, strict=True):
        row = rows[place]
        if value <= budget and row.verdict_baseline is Verdict.WITHIN_NOISE:
            word = Verdict.WORSE if decode_number(row.detail["change"]["value"]) > 0 else Verdict.BETTER
            severest = min((word, row.verdict), key=lambda verdict: verdict.severity)
            verdict = word if row.verdict is Verdict.WITHIN_NOISE else severest
            reason = f"{row.reason}; {word} by Holm's step over the session's {len(best)} tests (p {p:.2g})"
            settled[place] = replace(row, verdict=verdict, verdict_baseline=word, reason=reason)
    return settled
