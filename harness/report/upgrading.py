"""The report of an upgrade: an answer to act on, then what moved from side to side, family by family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from harness.records import Case, Row, Verdict
from harness.report import writing
from harness.report.answer import answer
from harness.report.comparison import OUTCOME, change
from harness.report.writing import code, escape, table
from harness.text import NOTHING, milliseconds, plural
from harness.two_reports import INVARIANT, Comparison, Entry, holds, seen

HOW = """\
Every side was measured on this machine in one run, with everything but the named package equal, the sides alternating.
A change is later / earlier. Perplexity is paired token by token, with Student's t over windows (95%); bytes are
compared to the byte; times are paired block by block between live processes that take turns (Hodges-Lehmann, 95%),
and within noise up to a tenth or what a side differs from itself. Lower is better everywhere."""


@dataclass(frozen=True)
class SideFacts:
    """One side as its report directory tells it."""

    label: str
    packages: Mapping[str, str]
    trouble: str  # why nothing of it could be measured, ""
    rows: Mapping[Case, Row]


@dataclass(frozen=True)
class Step:
    """Two sides compared; indexes into the sides."""

    before: int
    after: int
    comparison: Comparison

    @property
    def entries(self) -> dict[Case, Entry]:
        """By case."""
        return {entry.case: entry for entry in self.comparison.entries}


def render_upgrade(sides: Sequence[SideFacts], steps: Sequence[Step], *, where: str, command: str) -> str:
    """The whole report as markdown; the last step is the whole way, which the answer speaks of."""
    whole = steps[-1]
    first, last = sides[whole.before], sides[whole.after]
    parts = [
        f"# Upgrade: {escape(' -> '.join(side.label for side in sides))}",
        answer(whole.comparison, first.label, last.label, where),
    ]
    if len(steps) > 1:
        parts.append("\n".join(_step(sides, step) for step in steps))
    parts += ["## What did not load or run", _failures(sides)]
    parts += ["## Environment", f"On {escape(where)}. {_environment(sides)}"]
    every = list(dict.fromkeys(entry.case for step in steps for entry in step.comparison.entries))
    shown: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("perplexity", "## Quality", lambda value: f"{value:.4f}"),
        ("memory", "## Memory in bytes", lambda value: f"{value:,.0f}"),
    )
    for family, heading, written in shown:
        cases = [case for case in every if case.family == family and case.metric != "perplexity.delta"]
        if cases:
            parts += [heading, _table(sides, steps, cases, written)]
    for metric in dict.fromkeys(case.metric for case in every if case.family == "latency"):
        cases = [case for case in every if case.metric == metric]
        heading = f"## Speed: {metric.partition('.')[2]}, milliseconds"
        parts += [heading, _table(sides, steps, cases, lambda value: milliseconds(value))]
    behaved = [case for case in every if case.family == INVARIANT]
    if behaved:
        parts += ["## Behaviour", _behaviour(sides, steps, behaved)]
    parts += ["## How it was measured", HOW, writing.code_block(command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _step(sides: Sequence[SideFacts], step: Step) -> str:
    counts: dict[Verdict, int] = {}
    for entry in step.comparison.entries:
        if entry.verdict is not None:
            counts[entry.verdict] = counts.get(entry.verdict, 0) + 1
    told = ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in Verdict if verdict in counts)
    names = f"{sides[step.before].label} -> {sides[step.after].label}"
    return f"- {escape(names)}: **{OUTCOME[step.comparison.status].lower()}** ({told})"


def _failures(sides: Sequence[SideFacts]) -> str:
    lines = []
    for side in sides:
        if side.trouble:
            lines.append(f"- {escape(side.label)}: {escape(side.trouble)}")
            continue
        reasons: dict[str, list[Row]] = {}
        for row in side.rows.values():
            if row.value is None:
                reasons.setdefault(row.reason, []).append(row)
        for reason, rows in reasons.items():
            names = ", ".join(dict.fromkeys(f"{row.model} {row.method}" for row in rows))
            lines.append(f"- {escape(side.label)}: {plural(len(rows), 'case')} ({escape(names)}): {escape(reason)}")
    return "\n".join(lines) or "Everything planned ran on every side (a layer that raises stands under *Behaviour*)."


def _environment(sides: Sequence[SideFacts]) -> str:
    told = [side for side in sides if side.packages]
    names = sorted({name for side in told for name in side.packages})
    versions = {name: [side.packages.get(name, "absent") for side in told] for name in names}
    moved = [f"- {code(name)}: {escape(' -> '.join(v))}" for name, v in versions.items() if len(set(v)) > 1]
    equal = len(names) - len(moved)
    return f"{plural(equal, 'package')} equal on every side; not equal:\n\n" + ("\n".join(moved) or "- none")


def _table(
    sides: Sequence[SideFacts], steps: Sequence[Step], cases: Sequence[Case], written: Callable[[float], str]
) -> str:
    """One line a case: every side's value, then every step's change with its verdict."""
    entries = [step.entries for step in steps]
    lines = []
    for case in cases:
        what = f"{case.dataset} {case.protocol}" if case.dataset else case.metric.partition(".")[2]
        line = [code(case.model), code(case.method), code(what)]
        for side in sides:
            row = side.rows.get(case)
            line.append(str(Verdict.MISSING) if row is None or row.value is None else written(row.value))
        line += [_moved(found.get(case)) for found in entries]
        lines.append(line)
    headers = ["model", "method", "what", *(escape(side.label) for side in sides), *_arrows(sides, steps)]
    return table(headers, lines, words=(0, 1, 2))


def _arrows(sides: Sequence[SideFacts], steps: Sequence[Step]) -> list[str]:
    if len(steps) == 1:
        return ["change [95%]"]
    short = [side.label.rpartition("==")[2] for side in sides]
    return [escape(f"{short[step.before]} -> {short[step.after]}") for step in steps]


def _moved(entry: Entry | None) -> str:
    if entry is None or entry.verdict is None:
        return NOTHING
    if entry.verdict in (Verdict.SAME, Verdict.MISSING) or entry.change is None:
        return str(entry.verdict)
    if entry.case.family == "memory" and entry.a.value is not None and entry.b.value is not None:
        return (
            f"{entry.b.value - entry.a.value:+,.0f} ({100 * (entry.b.value / entry.a.value - 1):+.2f}%) {entry.verdict}"
        )
    return f"{change(entry)} {entry.verdict}"


def _behaviour(sides: Sequence[SideFacts], steps: Sequence[Step], cases: Sequence[Case]) -> str:
    """One line a method, check and what was seen, the models it was seen on together; what holds everywhere counted."""
    entries = [step.entries for step in steps]
    groups: dict[tuple[str, ...], list[str]] = {}
    faults: dict[str, str] = {}
    for case in cases:
        rows = [side.rows.get(case) for side in sides]
        if all(row is not None and row.value is not None and holds(row) for row in rows):
            continue
        looks = [seen(row) if row is not None else str(Verdict.MISSING) for row in rows]
        words = [str(entry.verdict) if (entry := found.get(case)) and entry.verdict else NOTHING for found in entries]
        names = {
            str(row.detail["fault"]): str(row.detail["reference"]) for row in rows if row and "fault" in row.detail
        }
        faults |= names
        known = ", ".join(code(name) for name in names) or NOTHING
        line = (code(case.metric.partition(".")[2]), code(case.method), *map(escape, looks), *words, known)
        groups.setdefault(line, []).append(case.model)
    kept = len(cases) - sum(len(models) for models in groups.values())
    opening = f"{kept:,} of {plural(len(cases), 'check')} hold on every side."
    if not groups:
        return opening
    lines = [[line[0], line[1], ", ".join(map(code, models)), *line[2:]] for line, models in groups.items()]
    headers = [
        "invariant",
        "method",
        "on",
        *(escape(side.label) for side in sides),
        *_arrows(sides, steps),
        "known fault",
    ]
    if len(steps) == 1:
        headers[-2] = "verdict"
    told = "\n".join(f"- {code(name)}: {escape(reference)}" for name, reference in faults.items())
    parts = [
        f"{opening} The others (a figure where one is over its limit):",
        table(headers, lines, words=range(len(headers))),
    ]
    return "\n\n".join(parts + ([f"Known faults, and where they are told:\n\n{told}"] if told else []))


def worst(steps: Sequence[Step]) -> int:
    """The exit status over every step: harm before undecided before fine."""
    return min((step.comparison.status for step in steps), key=(1, 3, 0).index)


__all__ = ["SideFacts", "Step", "render_upgrade", "worst"]
