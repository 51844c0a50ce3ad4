"""What a session would change in the recorded baselines: proposed as a markdown diff, written only when told to.

Or, without a session, what figures recorded by an older harness lack: the identity of their models (`identify`).
Figures are looked up and judged as a session does it; exact facts are compared by value. No torch.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from harness import judge
from harness.core.catalog import member_of
from harness.core.contracts import Checkpoint
from harness.core.environment import Environment, difference
from harness.core.errors import HarnessError
from harness.core.identity import identity_of
from harness.core.records import Row, Verdict
from harness.core.text import NOTHING, plural
from harness.judge import baselines, bounds
from harness.judge.baselines import (
    BRIEF,
    changes,
    exact_document,
    exact_facts,
    exact_path,
    holds,
    provenance,
    read_exact,
)
from harness.judge.verdicts import shown
from harness.report.account import change, measure
from harness.report.markup import bullets, code, escape, table
from harness.results.directory import LOSSES, nll_reader, read_report


@dataclass(frozen=True)
class Proposed:
    """One figure that would be recorded: as judged, and what is recorded of it now."""

    row: Row
    recorded: baselines.Recorded | None
    environment: Environment

    @property
    def replaces(self) -> bool:
        """Whether it would take the record's place; one of another class of environments stays beside it."""
        return self.recorded is not None and self.recorded.carries


@dataclass
class ChangedFacts:
    """What a file of exact facts would gain: what each row brings with its provenance, and what changes by it."""

    brought: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def over(self, recorded: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """The file as it should stand, over what is recorded."""
        document = None if recorded is None else dict(recorded)
        for facts, told in self.brought:
            document = exact_document(document, facts, told)
        return document


@dataclass(frozen=True)
class Proposal:
    """What would be written, and why other rows would not."""

    figures: tuple[Proposed, ...]
    facts: Mapping[Path, ChangedFacts]
    same: int
    refused: tuple[tuple[Row, str], ...]  # with the reason
    report: Path
    environments: Mapping[str, Mapping[str, Any]]
    identities: Mapping[str, Mapping[str, str]]


def propose(report: Path, folder: Path) -> Proposal:
    """Hold a finished session against the baselines of `folder`; HarnessError where the report has no measurement."""
    session = read_report(report)
    rows = [row for row in session.rows if row.value is not None]
    if not rows:
        raise HarnessError(f"{report} holds no measured case: nothing to record")
    rules, known = bounds.load(folder), baselines.Baselines(folder)
    nll = nll_reader(report, *(path.parent for path in sorted(folder.glob("*/nll"))))

    def identities(name: str) -> Mapping[str, str] | None:
        return session.identities.get(name) or known.identity(name)

    worlds = {name: told for name, told in session.environments.items() if Environment.from_dict(told).id == name}
    figures, refused, same = list[Proposed](), list[tuple[Row, str]](), 0
    for row in {row.case: row for row in rows}.values():
        if row.environment not in worlds:
            refused.append((row, f"its environment {row.environment} is not in environments.json, or changed there"))
            continue
        world = Environment.from_dict(worlds[row.environment])
        recorded = known.serving(row, world)
        told: Any = {"bounds": rules, "recorded": recorded, "environment": world, "nll": nll, "identities": identities}
        judged = judge.judge(row, member_of(row.case), **told)
        if member_of(row.case).exact:
            continue  # its file is compared below
        if judged.verdict_baseline is Verdict.SAME and recorded and recorded.carries:
            same += 1
        elif baselines.to_record([judged], "all"):
            figures.append(Proposed(judged, recorded, world))
        else:
            refused.append((judged, judged.reason or "nothing that can be recorded"))
    told = facts(rows, worlds, folder), same, tuple(refused), report, worlds, session.identities
    return Proposal(tuple(figures), *told)


def facts(rows: Sequence[Row], environments: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[Path, ChangedFacts]:
    """The files of exact facts that would change, and by what: facts that are new or other."""
    changed: dict[Path, ChangedFacts] = {}
    read = functools.cache(read_exact)
    for row in rows:
        brought, case = exact_facts(row, member_of(row.case)), row.case
        if not brought or row.environment not in environments:
            continue
        path = exact_path(folder, case)
        moved = changed.get(path) or ChangedFacts()
        before = moved.over(read(path))
        new = f"new: {case.metric}" + (f" on {case.dataset} under {case.protocol}" if case.dataset else "")
        lines = changes(before, brought) + ([] if holds(before, brought) else [new])
        known = (before or {}).get("provenance", {}).get("identity") or row.identity
        if row.identity and known != row.identity:
            lines.append(f"identity of the model: {known[:BRIEF]} -> {row.identity[:BRIEF]}")
        if lines:
            moved.brought.append((brought, provenance(environments[row.environment], row.identity)))
            moved.lines += [line for line in lines if line not in moved.lines]
            changed[path] = moved
    return changed


def render(proposal: Proposal) -> str:
    """The proposal as markdown."""
    changed = [figure for figure in proposal.figures if figure.replaces]
    fresh = len(proposal.figures) - len(changed)
    head = (
        f"{plural(len(changed), 'figure')} would change, {fresh:,} would be new, {proposal.same:,} stay as recorded; "
        f"{plural(len(proposal.facts), 'file')} of exact facts would change."
    )
    parts = [f"# Baselines from {escape(str(proposal.report))}", head]
    if proposal.figures:
        headers = ["model", "method", "metric", "old", "new", "change [95%]", "verdict", "repeats"]
        parts.append(table(headers, [_line(figure) for figure in proposal.figures], words=(0, 1, 2, -2)))
    compared = Counter(
        tuple(difference(figure.recorded.environment, figure.environment))
        for figure in proposal.figures
        if figure.recorded
    )
    for moved, count in compared.items():
        lines = moved or ("none: the same environment gave another figure",)
        parts.append(bullets(f"Environment difference of {plural(count, 'figure')}:", map(escape, lines)))
    for path, facts in proposal.facts.items():
        parts.append(bullets(f"Exact facts, {code(path.name)} of {code(path.parent.name)}:", map(escape, facts.lines)))
    if proposal.refused:
        reasons = (f"{code(row.case.id)}: {escape(reason)}" for row, reason in proposal.refused)
        parts.append(bullets("Not recorded, and why:", reasons))
    return "\n\n".join(parts) + "\n"


def _line(figure: Proposed) -> list[str]:
    row, recorded = figure.row, figure.recorded
    old = shown(recorded.value, row.unit) if recorded else NOTHING
    moved = change(row)
    if moved == NOTHING and recorded and row.value is not None:
        moved = f"{row.value - recorded.value:+.6g} {row.unit}"
    times = f"{recorded.repeats if recorded else NOTHING} → {max(1, len(row.samples))}"
    value = shown(row.value, row.unit) if row.value is not None else NOTHING
    names = [code(row.model), code(row.method), measure(row.case)]
    beside = recorded is not None and not figure.replaces
    word = f"new beside {recorded.file}" if recorded and beside else str(row.verdict_baseline)
    return [*names, old, value, moved, escape(word), times]


def write(proposal: Proposal, folder: Path) -> list[Path]:
    """Write what was proposed, each file whole or not at all, losses before the files that name them.

    Returns:
        The files written, in order.
    """
    rows = [figure.row for figure in proposal.figures]
    told = proposal.environments, proposal.report / LOSSES, proposal.identities
    written = baselines.record(folder, rows, *told)
    for path, moved in proposal.facts.items():
        with baselines.recording(folder):  # somebody may have recorded others in the meantime
            if document := moved.over(read_exact(path)):
                baselines.write_exact(path, document)
                written.append(path)
    with baselines.recording(folder):
        baselines.keep_identities({path.parent for path in written}, proposal.identities)
    return written


def identify(folder: Path, materialise: Callable[[str], Checkpoint]) -> Iterator[str]:
    """Give recorded figures what older ones lack, without measuring: their models' identities, and digests.

    A figure gets it where its weights are those of the model that can be read here: what the model computes with today
    is then taken for what it computed with.

    Args:
        folder: of the baselines.
        materialise: the checkpoint of a model's specification; HarnessError where it cannot be read here.

    Yields:
        A line for each model with figures that had none, and one where files had no digests.
    """
    for home in sorted(path for path in folder.glob("*") if path.is_dir()):
        files = [(path, *baselines.opened(path)) for path in baselines.overlays(home)]
        lacking = [entry for *_, entries in files for entry in entries if not entry.identity]
        if not lacking:
            continue
        model = files[0][1].model
        try:
            checkpoint = materialise(model)
        except HarnessError as error:
            yield f"{model}: {plural(len(lacking), 'figure')} as they were: it cannot be read here ({error})"
            continue
        identity, count = identity_of(checkpoint), 0
        others = sorted({entry.revision for entry in lacking} - {checkpoint.revision})
        with baselines.recording(folder):
            files = [(path, *baselines.opened(path)) for path in baselines.overlays(home)]  # others may have recorded
            for path, overlay, entries in files:
                same = [not entry.identity and entry.revision == checkpoint.revision for entry in entries]
                if any(same):
                    whole = (replace(e, identity=identity) if one else e for e, one in zip(entries, same, strict=True))
                    baselines.write_overlay(path, model, overlay.method, overlay.reach, whole)
                    count += sum(same)
            exact = [] if others or not count else baselines.exact_files(home)
            exact = [(path, document) for path, document in exact if not document["provenance"].get("identity")]
            for path, document in exact:
                document["provenance"]["identity"] = identity
                baselines.write_exact(path, document)
            baselines.keep_identities([home], {identity: checkpoint.identity})
        rest = f"; {plural(len(lacking) - count, 'figure')} as they were: of other weights ({_listed(others)})"
        given = f"{plural(count, 'figure')} and {plural(len(exact), 'file')} of exact facts"
        yield f"{model}: identity {identity[:BRIEF]} for {given}{rest if others else ''}"
    if sealed := baselines.seal(folder):
        yield f"digests for {plural(len(sealed), 'file')} that had none"


def _listed(revisions: Sequence[str]) -> str:
    return ", ".join(revision[:BRIEF] or "not recorded" for revision in revisions)
