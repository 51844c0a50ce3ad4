"""What a session would change in the recorded baselines: proposed as a markdown diff, written only when told to.

Figures are looked up and judged as a session does it; exact facts are compared by value. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness import judge
from harness.core.catalog import member_of
from harness.core.environment import Environment, difference
from harness.core.errors import HarnessError
from harness.core.files import replace_text
from harness.core.records import Row, Verdict
from harness.core.text import NOTHING, plural
from harness.judge import baselines, bounds
from harness.judge.baselines import changes, exact_document, exact_facts, exact_path, holds, provenance, read_exact
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


@dataclass(frozen=True)
class Proposal:
    """What would be written, and why other rows would not."""

    figures: tuple[Proposed, ...]
    facts: Mapping[Path, tuple[dict[str, Any], tuple[str, ...]]]  # file -> the document, and what changes in it
    same: int
    refused: tuple[tuple[Row, str], ...]  # with the reason
    report: Path
    environments: Mapping[str, Mapping[str, Any]]


def propose(report: Path, folder: Path) -> Proposal:
    """Hold a finished session against the baselines of `folder`; HarnessError where the report has no measurement."""
    session = read_report(report)
    rows = [row for row in session.rows if row.value is not None]
    if not rows:
        raise HarnessError(f"{report} holds no measured case: nothing to record")
    rules, known = bounds.load(folder), baselines.Baselines(folder)
    nll = nll_reader(report, *(path.parent for path in sorted(folder.glob("*/nll"))))
    figures, refused, same = list[Proposed](), list[tuple[Row, str]](), 0
    for row in {row.case: row for row in rows}.values():
        if row.environment not in session.environments:
            refused.append((row, f"its environment {row.environment} is not in environments.json"))
            continue
        world = Environment.from_dict(session.environments[row.environment])
        recorded = known.find(row.case, world)
        judged = judge.judge(row, member_of(row.case), bounds=rules, recorded=recorded, environment=world, nll=nll)
        if member_of(row.case).exact:
            continue  # its file is compared below
        if judged.verdict_baseline is Verdict.SAME and recorded and recorded.carries:
            same += 1
        elif baselines.to_record([judged], "all"):
            figures.append(Proposed(judged, recorded, world))
        else:
            refused.append((judged, judged.reason or "nothing that can be recorded"))
    worlds = session.environments
    return Proposal(tuple(figures), facts(rows, worlds, folder), same, tuple(refused), report, worlds)


def facts(
    rows: Sequence[Row], environments: Mapping[str, Mapping[str, Any]], folder: Path
) -> dict[Path, tuple[dict[str, Any], tuple[str, ...]]]:
    """The files of exact facts that would change: the document, and the facts that are new or other."""
    changed: dict[Path, tuple[dict[str, Any], tuple[str, ...]]] = {}
    for row in rows:
        brought, case = exact_facts(row, member_of(row.case)), row.case
        if not brought or row.environment not in environments:
            continue
        path = exact_path(folder, case)
        before, kept = changed.get(path) or (read_exact(path), ())
        new = f"new: {case.metric}" + (f" on {case.dataset} under {case.protocol}" if case.dataset else "")
        if lines := changes(before, brought) + ([] if holds(before, brought) else [new]):
            document = exact_document(before, brought, provenance(environments[row.environment]))
            changed[path] = document, tuple(dict.fromkeys((*kept, *lines)))
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
    for path, (_, told) in proposal.facts.items():
        parts.append(bullets(f"Exact facts, {code(path.name)} of {code(path.parent.name)}:", map(escape, told)))
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
    written = baselines.record(folder, rows, proposal.environments, proposal.report / LOSSES)
    for path, (document, _) in proposal.facts.items():
        replace_text(path, yaml.safe_dump(document, default_flow_style=False, allow_unicode=True, indent=2))
        written.append(path)
    return written
