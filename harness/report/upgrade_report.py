"""The report of an upgrade: an answer to act on, then what moved from side to side, family by family.

One paragraph on an upgrade that a release manager can act on, made of the comparison alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.core.records import Case, Row, Verdict
from harness.core.text import NOTHING, milliseconds, percent, plural
from harness.judge.two_reports import INVARIANT, Comparison, Entry, holds, seen
from harness.report import markup
from harness.report.comparison import OUTCOME, change
from harness.report.markup import code, escape, table

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
    parts += ["## How it was measured", HOW, markup.code_block(command)]
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


CERTAIN = (Verdict.WORSE, Verdict.BETTER)
WORDS = {0: "does no harm that was measured", 1: "does harm", 3: "cannot be decided"}


def answer(comparison: Comparison, before: str, after: str, where: str) -> str:
    """What moves between the two ends, and what to do."""
    entries = comparison.entries
    # equal shas of the losses are a pairing of every token too
    tokens = sum(entry.paired or bool(entry.a.nll and entry.a.nll == entry.b.nll) for entry in entries)
    opening = (
        f"**Moving from {escape(before)} to {escape(after)} {WORDS[comparison.status]}** on {escape(where)}, over "
        f"{plural(len(entries), 'case')}, {tokens:,} of them compared token by token."
    )
    sentences = [
        opening,
        _quality([entry for entry in entries if entry.case.metric == "perplexity"]),
        _memory([entry for entry in entries if entry.case.family == "memory"]),
        *_speed(entries),
        _invariants([entry for entry in entries if entry.case.family == INVARIANT]),
        _missing(entries),
        _advice(comparison),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _names(entries: Iterable[Entry]) -> str:
    return ", ".join(code(name) for name in dict.fromkeys(entry.case.method for entry in entries))


def _interval(entry: Entry) -> str:
    if entry.change is None:
        return ""
    if entry.low is None or entry.high is None:
        return f" {percent(entry.change)}"
    return f" {percent(entry.change)} [{percent(entry.low)}, {percent(entry.high)}]"


def _quality(entries: Sequence[Entry]) -> str:
    if not entries:
        return ""
    parts = []
    for verdict in (Verdict.WORSE, Verdict.UNUSABLE, Verdict.BETTER):
        if found := [entry for entry in entries if entry.verdict is verdict]:
            each = ", ".join(f"{code(e.case.method)} on {code(e.case.model)}{_interval(e)}" for e in found)
            parts.append(f"{verdict} for {each}")
    rest = [entry for entry in entries if entry.verdict in (Verdict.WITHIN_NOISE, Verdict.SAME)]
    if rest:
        equal = [entry for entry in rest if entry.verdict is Verdict.SAME]
        largest = max((abs(entry.change or 0.0) for entry in rest), default=0.0)
        told = f"unchanged within noise for {_names(rest)} (at most {100 * math.expm1(largest):.2g}%"
        parts.append(told + (f"; bit for bit for {_names(equal)})" if equal else ")"))
    return f"Quality: {'; '.join(parts)}." if parts else ""


def _memory(entries: Sequence[Entry]) -> str:
    if not entries:
        return ""
    moved = [entry for entry in entries if entry.verdict in CERTAIN]
    if not moved:
        return "Memory: no byte moved."
    each = []
    for entry in moved:
        a, b = entry.a.value or 0.0, entry.b.value or 0.0
        what = entry.case.metric.partition(".")[2].replace("_after", " after the first forward")
        whose = f"{what} of {code(entry.case.method)} on {code(entry.case.model)}"
        each.append(f"{whose} {b - a:+,.0f} B ({percent(math.log(b / a))})")
    exact = [entry for entry in entries if entry.verdict is Verdict.SAME]
    return f"Memory: {'; '.join(each)}; {plural(len(exact), 'figure')} equal to the byte."


def _speed(entries: Sequence[Entry]) -> list[str]:
    found = []
    for metric in dict.fromkeys(entry.case.metric for entry in entries if entry.case.family == "latency"):
        timed = [entry for entry in entries if entry.case.metric == metric]
        parts = []
        for verdict, word in ((Verdict.WORSE, "slower"), (Verdict.BETTER, "faster")):
            if moved := [entry for entry in timed if entry.verdict is verdict and entry.change is not None]:
                each = ", ".join(
                    f"{code(e.case.method)} {math.exp(abs(e.change or 0.0)):.3g} times on {code(e.case.model)}"
                    for e in moved
                )
                parts.append(f"{word} for {each}")
        if rest := [entry for entry in timed if entry.verdict not in CERTAIN and entry.verdict is not Verdict.UNUSABLE]:
            parts.append(f"within noise for {_names(rest)}")
        if wide := [entry for entry in timed if entry.verdict is Verdict.UNUSABLE]:
            parts.append(f"not decided for {_names(wide)}")
        found.append(f"{metric.partition('.')[2].capitalize()}: {'; '.join(parts)}.")
    return found


def _invariants(entries: Sequence[Entry]) -> str:
    if not entries:
        return ""
    parts = []
    for verdict, words in ((Verdict.WORSE, "no longer {}"), (Verdict.BETTER, "{} again")):
        if found := [entry for entry in entries if entry.verdict is verdict]:
            words = words.format("holds" if len(found) == 1 else "hold")
            parts.append(f"{plural(len(found), 'check')} {words}: {_checks(found)}")
    kept = sum(entry.verdict in (Verdict.SAME, Verdict.WITHIN_NOISE) for entry in entries)
    return f"Behaviour: {'; '.join([*parts, f'{kept:,} are as they were'])}."


def _checks(entries: Sequence[Entry]) -> str:
    """Checks by name, those of the same methods together."""
    methods: dict[str, list[Entry]] = {}
    for entry in entries:
        methods.setdefault(entry.case.metric.partition(".")[2], []).append(entry)
    together: dict[str, list[str]] = {}
    for name, found in methods.items():
        together.setdefault(_names(found), []).append(code(name))
    return "; ".join(f"{', '.join(names)} ({whose})" for whose, names in together.items())


def _missing(entries: Sequence[Entry]) -> str:
    absent = [entry for entry in entries if entry.a.value is None or entry.b.value is None]
    return f"{plural(len(absent), 'case')} did not run on both sides ({_names(absent)}), see below." if absent else ""


def _advice(comparison: Comparison) -> str:
    worse = [entry for entry in comparison.entries if entry.verdict is Verdict.WORSE]
    if comparison.status == 0:
        return "Nothing here speaks against moving."
    if comparison.status == 3:
        return "Before moving, decide what is open: raise `--repetitions` or `--max-tokens`, or mend what did not run."
    known = [entry for entry in worse if entry.b.detail.get("fault")]
    new = [entry for entry in worse if entry.case.family == INVARIANT and not entry.b.detail.get("fault")]
    told = (
        f" {len(known):,} of the {len(worse):,} harms are known faults, each with its reference below." if known else ""
    )
    if new:
        told += f" Not known before: {_names(new)} ({', '.join(code(e.case.metric) for e in new[:5])})."
    return f"Before moving, make sure that nothing you do meets what is worse.{told}"
