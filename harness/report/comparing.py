"""Compares two finished sessions case by case: what is same, within noise, better or worse, and by how much.

The rule of environments is lifted here (their difference is what a comparison asks about); that of protocol id and
token hash never is. A is the earlier side, B the later: `worse` says that B is worse. Each case is decided at 95% by
itself: unlike a session's verdicts (`harness.family`), a comparison of many cases has no error rate as a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from harness import catalog
from harness.bounds import DEFAULTS, Bounds
from harness.bounds import read as read_bounds
from harness.contracts import Member
from harness.errors import HarnessError
from harness.records import Case, Row, Verdict
from harness.report.account import flatten
from harness.report.behaviour import FAMILY, behaved
from harness.report.decisions import (
    Entry,
    absent,
    broken,
    decide,
    differing,
    moved,
    same,
    timed,
    valued,
)
from harness.report.reading import Nll, latest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HARM = (Verdict.MISSING, Verdict.WORSE)
UNDECIDED = (Verdict.UNUSABLE, Verdict.NOT_COMPARABLE)


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
    nll_a: Nll,
    nll_b: Nll,
    *,
    environments_a: Mapping[str, Mapping[str, Any]] | None = None,
    environments_b: Mapping[str, Mapping[str, Any]] | None = None,
    members: Mapping[str, Member] | None = None,
    bounds: Bounds | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Compare two sessions.

    Args:
        rows_a: of the earlier side; for one case the last stands.
        rows_b: of the later side.
        nll_a: per-token NLL in nats by its sha, None where there is none (a bare measurements.jsonl).
        nll_b: the same for B.
        environments_a: by id, for the printed difference.
        environments_b: the same for B.
        members: metrics by full name; those of the catalogue by default.
        bounds: below what a change is noise; the package's own by default.
        notes: carried into the comparison.

    Raises:
        HarnessError: the sides share no case.
    """
    a, b = ({row.case: row for row in latest(rows)} for rows in (rows_a, rows_b))
    shared = [case for case in a if case in b]
    if not shared:
        raise HarnessError(
            f"nothing to compare: A has {len(a)} cases, B has {len(b)}, and none is in both "
            "(model, method, dataset, protocol, metric, device, reference)"
        )
    judge = _Judge(
        _Side(a, nll_a), _Side(b, nll_b), members.get if members else catalog.member, bounds or package_bounds()
    )
    return Comparison(
        tuple(judge.entry(a[case], b[case]) for case in shared),
        tuple(case for case in a if case not in b),
        tuple(case for case in b if case not in a),
        environment_difference(
            [a[case] for case in shared], environments_a or {}, [b[case] for case in shared], environments_b or {}
        ),
        (*notes, *identity_notes([(a[case], b[case]) for case in shared])),
    )


def package_bounds() -> Bounds:
    """The harness's own bounds, without a repository's."""
    return Bounds(read_bounds(DEFAULTS))


def identity_notes(pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    """Weights and written-out methods that are not the same on both sides: comparable, but a reader must know."""
    kinds = (("weights", "model", "revision"), ("arguments", "method", "method_id"))
    found = {
        f"{kind} of {getattr(a, owner)} differ: {getattr(a, name)} -> {getattr(b, name)}": None
        for kind, owner, name in kinds
        for a, b in pairs
        if getattr(a, name) and getattr(b, name) and getattr(a, name) != getattr(b, name)
    }
    return list(found)


def environment_difference(
    rows_a: Sequence[Row],
    known_a: Mapping[str, Mapping[str, Any]],
    rows_b: Sequence[Row],
    known_b: Mapping[str, Mapping[str, Any]],
) -> tuple[str, ...]:
    """One line a field that differs: every value it had on A, an arrow, every value on B."""
    sides = [_fields(rows, known) for rows, known in ((rows_a, known_a), (rows_b, known_b))]
    names = dict.fromkeys(itertools.chain(*sides))
    texts = [[" or ".join(side.get(name, {})) or "(none)" for side in sides] for name in names]
    return tuple(f"{name}: {a} -> {b}" for name, (a, b) in zip(names, texts, strict=True) if a != b)


def _fields(rows: Sequence[Row], known: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, None]]:
    found: dict[str, dict[str, None]] = {}
    for environment in dict.fromkeys(row.environment for row in rows):
        for name, value in flatten(known.get(environment, {})).items():
            found.setdefault(name, {})[value] = None
    return found


@dataclass(frozen=True)
class _Side:
    rows: Mapping[Case, Row]
    read: Nll

    def nll(self, row: Row) -> NDArray[np.float32] | None:
        """Per-token NLL of a row."""
        return self.read(row.nll) if row.nll else None

    def excess(self, row: Row) -> NDArray[np.float32] | None:
        """Per-token NLL of a row above the reference's on the same tokens."""
        case = row.case._replace(method=row.reference, metric="perplexity")
        own, reference = self.nll(row), self.rows.get(case)
        base = self.nll(reference) if reference is not None else None
        return own - base if own is not None and base is not None and own.shape == base.shape else None


@dataclass(frozen=True)
class _Judge:
    a: _Side
    b: _Side
    member: Callable[[str], Member | None]
    bounds: Bounds

    def entry(self, a: Row, b: Row) -> Entry:
        """The first rule that applies decides."""
        blank = Entry(a.case, a, b, None, "")
        if a.value is None or b.value is None:
            return absent(blank)
        if field := differing(a, b):
            return replace(blank, verdict=Verdict.NOT_COMPARABLE, reason=field)
        if a.metric in ("perplexity", "perplexity.delta"):
            return self._perplexity(blank, a.value, b.value)
        if a.case.family == FAMILY:
            return behaved(blank)
        member = self.member(a.metric)
        if a.case.family == "latency" or (member is not None and member.timed):
            return timed(blank, self.bounds.allowance(blank.case))
        return valued(blank, member, self.bounds.allowance(blank.case), a.value, b.value)

    def _perplexity(self, blank: Entry, a: float, b: float) -> Entry:
        if blank.a.nll and blank.a.nll == blank.b.nll and same(a, b):
            return replace(blank, verdict=Verdict.SAME, reason="bit-identical losses", **moved(a, b, blank.case.metric))
        if found := broken(blank, a, b):
            return found
        pick = _Side.nll if blank.case.metric == "perplexity" else _Side.excess
        before, after = pick(self.a, blank.a), pick(self.b, blank.b)
        counts = blank.a.detail.get("window_counts")
        if before is None or after is None or not counts or not before.shape == after.shape == (sum(counts),):
            return self._unpaired(blank, a, b)
        if (before == after).all():
            words = ("bit-identical losses", "the same distance to the reference at every token")
            reason = words[pick is _Side.excess]
            return replace(blank, verdict=Verdict.SAME, reason=reason, change=0.0, low=0.0, high=0.0, paired=True)
        from harness.stats import paired_delta  # numpy, which nothing unchanged needs

        ends = list(itertools.accumulate(counts))
        spans = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        change = paired_delta(after, before, spans)
        floor = self.bounds.floor(blank.case)
        found = replace(blank, change=change.value, low=change.low, high=change.high, paired=True)
        windows = f"over {change.count} windows; floor {floor:g} nats"
        if not change.usable and abs(change.value) > floor:
            return replace(found, verdict=Verdict.UNUSABLE, reason=f"no interval {windows}")
        verdict = decide(change.low, change.high, floor) if change.usable else Verdict.WITHIN_NOISE
        return replace(found, verdict=verdict, reason=f"paired {windows}")

    def _unpaired(self, blank: Entry, a: float, b: float) -> Entry:
        shift = moved(a, b, blank.case.metric)
        change = shift["change"]
        if change is not None and abs(change) <= self.bounds.floor(blank.case):
            return replace(blank, verdict=Verdict.WITHIN_NOISE, reason="values only, nothing was paired", **shift)
        return replace(blank, verdict=Verdict.UNUSABLE, reason="values only, nothing was paired: no interval", **shift)
