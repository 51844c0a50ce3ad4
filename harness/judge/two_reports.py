"""Two reports case by case: what is same, within noise, better or worse, and by how much. No torch.

The rules are those of `rules`. That of environments is lifted, and that of the model where its revision differs (their
difference is what a comparison asks about; it is noted, fact by fact); that of protocol id, token hash and whatever
else a model of one revision is made of never is. A is the earlier side, B the later: `worse` says that B is worse. Each
case is decided at 95% by itself: unlike a session's verdicts, a comparison of many cases has no error rate as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.core import catalog
from harness.core.contracts import Member
from harness.core.environment import Environment
from harness.core.errors import HarnessError
from harness.core.identity import changed_facts
from harness.core.records import Case, Row, Verdict
from harness.core.text import number, percent
from harness.core.values import flatten
from harness.judge import rules
from harness.judge.bounds import Bounds, packaged
from harness.judge.rules import Identities, Losses, Outcome, Question, unknown_identity

HARM = (Verdict.MISSING, Verdict.INPUT_CHANGED, Verdict.WORSE)
UNDECIDED = (Verdict.UNUSABLE, Verdict.NOT_COMPARABLE)
TIMES = (rules.RATIO, rules.TURNS)
INVARIANT = "invariant"
FACTOR = 2.0  # of two figures that both break a limit: less apart is the same break under other rounding


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


@dataclass(frozen=True)
class Comparison:
    """Every shared case, what only one side has, and how the environments differ."""

    entries: tuple[Entry, ...]
    only_a: tuple[Case, ...] = ()
    only_b: tuple[Case, ...] = ()
    environment: tuple[str, ...] = ()  # 'torch: 2.8.0 -> 2.9.0'
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> int:
        """The exit status: 1 harm, 3 undecided, 0 fine."""
        verdicts = {entry.verdict for entry in self.entries}
        return 1 if verdicts & set(HARM) else 3 if verdicts & set(UNDECIDED) else 0

    @property
    def paired(self) -> int:
        """How many cases were compared token by token."""
        return sum(entry.paired for entry in self.entries)


def compare(
    rows_a: Sequence[Row],
    rows_b: Sequence[Row],
    nll_a: Losses,
    nll_b: Losses,
    *,
    environments_a: Mapping[str, Mapping[str, Any]] | None = None,
    environments_b: Mapping[str, Mapping[str, Any]] | None = None,
    bounds: Bounds | None = None,
    notes: Sequence[str] = (),
    identities: Identities = unknown_identity,
) -> Comparison:
    """Compare two sessions.

    Args:
        rows_a: of the earlier side; for one case the last stands.
        rows_b: of the later side.
        nll_a: per-token NLL in nats by its sha, None where there is none (a bare measurements.jsonl).
        nll_b: the same for B.
        environments_a: by id, for the printed difference and for what a method's products were computed in.
        environments_b: the same for B.
        bounds: below what a change is noise; the package's own by default.
        notes: carried into the comparison.
        identities: a model's facts by their digest, of either side; None where nobody knows them.

    Raises:
        HarnessError: the sides share no case.
    """
    a, b = ({row.case: row for row in rows} for rows in (rows_a, rows_b))
    shared = [case for case in a if case in b]
    if not shared:
        raise HarnessError(
            f"nothing to compare: A has {len(a)} cases, B has {len(b)}, and none is in both "
            "(model, method, dataset, protocol, metric, device, reference)"
        )
    pairs = [(a[case], b[case]) for case in shared]
    # weights and written-out methods that are not the same on both sides: comparable, but a reader must know
    kinds = (("weights", "model", "revision"), ("arguments", "method", "method_id"))
    differing = {
        f"{kind} of {getattr(a, owner)} differ: {getattr(a, name)} -> {getattr(b, name)}": None
        for kind, owner, name in kinds
        for a, b in pairs
        if getattr(a, name) and getattr(b, name) and getattr(a, name) != getattr(b, name)
    }
    for model, then, now in dict.fromkeys((a.model, a.identity, b.identity) for a, b in pairs):
        before, after = (identities(digest) if digest else None for digest in (then, now))
        lines = changed_facts(before, after) if before and after else []
        differing |= {f"{model}: {line}": None for line in lines[: rules.NAMED]}
    sides = [_fields((a for a, _ in pairs), environments_a or {}), _fields((b for _, b in pairs), environments_b or {})]
    values = [(name, *(" or ".join(side.get(name, {})) or "(none)" for side in sides)) for name in sides[0] | sides[1]]

    def nll(sha: str) -> NDArray[np.float32] | None:
        """Of either side: a sha names the same bytes on both."""
        return nll_b(sha) if (found := nll_a(sha)) is None else found

    worlds = [
        {name: Environment.from_dict(told) for name, told in (side or {}).items()}
        for side in (environments_a, environments_b)
    ]
    shipped = bounds or packaged()

    def question(a: Row, b: Row) -> Question:
        member = catalog.member(b.metric) or Member(b.metric, b.unit, "neither")
        before, now = (known.get(row.environment) for known, row in zip(worlds, (a, b), strict=True))
        return Question(b, member, shipped, a, nll, now, 1, identities, before)

    return Comparison(
        tuple(_entry(a, b, question(a, b)) for a, b in pairs),
        tuple(case for case in a if case not in b),
        tuple(case for case in b if case not in a),
        tuple(f"{name}: {before} -> {now}" for name, before, now in values if before != now),
        (*notes, *differing),
    )


def _fields(rows: Iterable[Row], known: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, None]]:
    """Every value that each field of the rows' environments has on one side."""
    values: dict[str, dict[str, None]] = {}
    for environment in dict.fromkeys(row.environment for row in rows):
        for name, value in flatten(known.get(environment, {})).items():
            values.setdefault(name, {})[value] = None
    return values


def _entry(a: Row, b: Row, question: Question) -> Entry:
    """A case's verdict, and its change where one can be had."""
    blank, known = Entry(a.case, a, b, None, ""), catalog.member(a.metric)
    if a.left_out and b.left_out:
        return replace(blank, reason=b.reason)
    if b.value is None and a.value is not None:
        return replace(blank, verdict=Verdict.MISSING, reason=f"missing in B: {b.reason or 'no reason was given'}")
    if a.value is None or b.value is None:
        text = f"missing in {'both' if b.value is None else 'A'}: {a.reason or 'no reason was given'}"
        return replace(blank, verdict=Verdict.UNUSABLE, reason=text)
    if obstacle := rules.obstacle(question):
        return replace(blank, verdict=obstacle.verdict, reason=obstacle.text)
    if a.case.family == INVARIANT:
        return behaved(blank)
    observed = [(one.value, one.samples, one.interval, one.nll) for one in (a, b)]
    if observed[0] == observed[1] and not a.nll and (a.samples or not question.member.timed):
        return _with_values(replace(blank, verdict=Verdict.SAME, reason="equal values"), a.value, b.value)
    if question.member.timed and a.method == a.reference and not rules.in_turn(b, a):
        shown = replace(blank, reason="the reference's own time is shown, not judged")
        return _with_values(shown, a.value, b.value)
    outcome = rules.outcome(question, a.value, b.value)
    if known is None and outcome.verdict is not Verdict.SAME:
        outcome = replace(outcome, verdict=Verdict.UNUSABLE)
    text, change = _reason(question, outcome, a.value, b.value), outcome.change
    entry = replace(blank, verdict=outcome.verdict, reason=text, paired=outcome.rms is not None)
    judged = outcome.ground in TIMES or a.metric in ("perplexity", "perplexity.delta")
    if change is not None and judged:  # of the two values themselves
        return replace(entry, change=change.value, low=change.low, high=change.high)
    return entry if outcome.ground in (*TIMES, rules.NOT_FINITE) else _with_values(entry, a.value, b.value)


def _with_values(entry: Entry, a: float, b: float) -> Entry:
    is_ratio = entry.case.family in rules.RATIOS
    return replace(entry, change=rules.value_change(entry.case.metric, a, b), is_ratio=is_ratio)


def _reason(question: Question, outcome: Outcome, a: float, b: float) -> str:
    """What a case was decided by, in words."""
    change, ground, undecided = outcome.change, outcome.ground, outcome.verdict is Verdict.UNUSABLE
    if ground == rules.NOT_FINITE:
        sides = (("A", question.before, a), ("B", question.row, b))
        lost = [name for name, side, value in sides if not rules.sound(side, value)]
        fault = ": its reference's losses are not" if undecided and len(lost) == 1 else ""
        return "not finite on both sides" if len(lost) == 2 else f"not finite in {lost[0]}{fault}"
    if ground == rules.EQUAL_LOSSES:
        same = outcome.verdict is Verdict.SAME
        return "bit-identical losses" if same else "bit-identical losses, but what is made of them changed"
    if ground == rules.EDITED_RECORD:
        return "a perplexity is not above zero"
    if change is not None and ground in (rules.VALUES, rules.PAIRED_LOSSES, rules.TOKENS, rules.THIS_TEXT):
        text = f"paired over {change.count:,} tokens" if outcome.rms is not None else "values only, nothing was paired"
        text += f"; floor {outcome.floor:g} nat" if outcome.floor else ""
        if ground == rules.THIS_TEXT:
            text += f"; beyond {percent(question.room)} on this very text, where it is exact"
        if ground == rules.TOKENS:
            text += f"; a token moved by {outcome.rms:.3g} nat (root mean square), noise up to {outcome.rms_limit:.3g}"
        return text
    return _figure(question, outcome, b - a) if ground == rules.FIGURE else _times(outcome, question)


def _figure(question: Question, outcome: Outcome, change: float) -> str:
    row, member, limit = question.row, question.member, outcome.floor
    if outcome.verdict is Verdict.SAME:
        return "equal values"
    if member.better not in ("lower", "higher") and outcome.verdict is not Verdict.WITHIN_NOISE:
        return "values differ and no direction is better"
    if member.exact or (row.case.family == "memory" and not limit):
        return f"{change:+,.0f} {row.unit}, exact"
    if row.case.family == "memory":
        return f"observed once; noise up to {percent(math.log(question.allowance), sign='')}"
    return "exact on this text" + (f"; noise up to {number(limit)} {row.unit}" if limit else "")


def _times(outcome: Outcome, question: Question) -> str:
    for name, side in (("A", question.before), ("B", question.row)):
        if side.detail.get("crowded"):
            others = rules.number(side.detail.get("others")) or 0.0
            return f"other work kept {others:.1f} cores busy while {name} was timed: measure again on a quiet machine"
    change, undecided = outcome.change, outcome.verdict is Verdict.UNUSABLE
    noise = f"noise up to {percent(outcome.floor, sign='')}"
    if outcome.ground == rules.RATIO:
        if change is None:
            return "no usable ratio to the reference on both sides"
        wide = "the ratio's interval is too wide to decide"
        return f"{wide if undecided else 'ratio to the reference'}; {noise}"
    if change is None:
        return "the two sides have not equally many repetitions"
    kind = "the interval is too wide to decide" if undecided else "taken in turn"
    return f"{kind if change.usable else 'no interval'} over {change.count} blocks; {noise}"


def holds(row: Row) -> bool:
    """Whether the invariant held."""
    return row.detail.get("holds") is True


def seen(row: Row) -> str:
    """What was seen, in a few words: 'holds', the exception, or the figure."""
    if row.value is None:
        return str(Verdict.MISSING)
    exception = str(row.detail.get("exception", ""))
    return "holds" if holds(row) else exception or number(row.value, 3)


def behaved(blank: Entry) -> Entry:
    """An invariant on both sides: kept, lost, regained, or broken on both alike or otherwise."""
    a, b = blank.a, blank.b
    fault = f"; known as {b.detail['fault']} ({b.detail.get('reference', '')})" if b.detail.get("fault") else ""
    if holds(a) and holds(b):
        return replace(blank, verdict=Verdict.SAME, reason="holds on both sides")
    if holds(a) or holds(b):
        verdict, words = (Verdict.WORSE, "no longer holds") if holds(a) else (Verdict.BETTER, "holds again")
        return replace(blank, verdict=verdict, reason=f"{words}: {seen(a)} -> {seen(b)}{fault}")
    raised = [bool(row.detail.get("exception")) for row in (a, b)]
    verdict = Verdict.WITHIN_NOISE  # as is what lies within the range that both sides' known fault lists
    if raised[0] != raised[1]:
        verdict = Verdict.BETTER if raised[0] else Verdict.WORSE
    elif raised[0] or a.value is None or b.value is None or a.value == b.value:
        verdict = Verdict.SAME
    elif not a.detail.get("fault") or a.detail["fault"] != b.detail.get("fault"):
        apart = Verdict.WORSE if b.value > FACTOR * a.value else Verdict.BETTER if a.value > FACTOR * b.value else None
        verdict = apart or verdict
    return replace(blank, verdict=verdict, reason=f"holds on neither side: {seen(a)} -> {seen(b)}{fault}")
