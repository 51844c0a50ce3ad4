"""A comparison as markdown that also reads in a terminal; and the report of an upgrade, made of comparisons.

An upgrade's report opens with one paragraph to act on, then shows what moved from side to side, family by family.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.core.records import Case, Row, Verdict
from harness.core.text import NOTHING, exp, mib, milliseconds, number, percent, perplexity, plural, ratio
from harness.judge.rules import in_turn
from harness.judge.two_reports import HARM, INVARIANT, UNDECIDED, Comparison, Entry, holds, seen
from harness.report.account import BEHAVIOUR, MEMORY, NO_RECORD, QUALITY, SHOWN, SPEED, grouped, kind, place, words
from harness.report.markup import bullets, code, code_block, escape, table
from harness.report.tables import to_reference

OUTCOME = {0: "No harm", 1: "Harm", 3: "Undecided"}
HOW = """\
Every side was measured on this machine in one run, with everything but the named package equal, the sides alternating.
A change is later / earlier. Perplexity is paired token by token, with Student's t over windows (95%); bytes are
compared to the byte; times are paired block by block between live processes that take turns (Hodges-Lehmann, 95%),
and within noise up to a tenth or what a side differs from itself. Lower is better everywhere."""
CERTAIN = (Verdict.WORSE, Verdict.BETTER)
WORDS = {0: "does no harm that was measured", 1: "does harm", 3: "cannot be decided"}


def render_comparison(comparison: Comparison) -> str:
    """The outcome, what needs a look, the environment difference, and one table a model, device and text."""
    entries = comparison.entries
    parts = ["# A against B", f"**{outcome(comparison)}**: {_counted(comparison)}", "\n".join(_by_kind(entries))]
    for verdicts in (HARM, UNDECIDED):
        if moved := [entry for entry in entries if entry.verdict in verdicts]:
            told = []
            for entry in moved[:SHOWN]:
                said = (place(entry.case), change(entry), escape(entry.reason))
                told.append(f"- **{entry.verdict}**: {': '.join(part for part in said if part != NOTHING)}")
            if len(moved) > SHOWN:
                told.append(f"- … and {len(moved) - SHOWN:,} more, in the tables.")
            parts.append("\n".join(told))
    parts += [f"Note: {escape(note)}" for note in comparison.notes]
    differing = bullets("Environment difference:", map(escape, comparison.environment))
    parts.append(differing if comparison.environment else "Environment: no recorded difference.")
    headers = ["method", "metric", "A", "B", "change [95%]", "verdict"]
    groups = grouped(
        entries, lambda entry: (entry.case.model, entry.case.device, entry.case.dataset, entry.case.protocol)
    )
    for (model, device, dataset, protocol), members in groups.items():
        text = f": {code(dataset)}, {code(protocol)}" if dataset else ""
        lines = [
            [code(entry.case.method), code(entry.case.metric), *_values(entry), change(entry), _word(entry)]
            for entry in members
        ]
        parts += [f"## {code(model)} on {escape(device)}{text}", table(headers, lines, words=(0, 1, -1))]
    for name, cases in (("A", comparison.only_a), ("B", comparison.only_b)):
        if cases:
            whose = [escape(whose) for whose in dict.fromkeys(f"{case.model}, {case.method}" for case in cases)]
            named = "; ".join([*whose[:SHOWN], "…"] if len(whose) > SHOWN else whose)
            parts.append(f"Only in {name}: {plural(len(cases), 'case')} ({named}).")
    parts.append(
        "Change is B / A (B - A for metrics that are no ratio), with a 95% interval where one could be had: Student's "
        "t over windows for perplexity; for time, whose change is that of its ratio to the reference in the same "
        "session, the two sessions' intervals combined. A time stands as that ratio; the reference's milliseconds were "
        "taken at two moments. Each interval is of 95% by itself, not corrected for the number of cases: of twenty "
        "that did not move, one may lie beyond its noise floor. Lower is better. MiB is 2^20 bytes."
    )
    return "\n\n".join(parts) + "\n"


def outcome(comparison: Comparison) -> str:
    """The answer in a few words; no harm is said only where something was compared."""
    verdicts = {entry.verdict for entry in comparison.entries} - {None}
    if verdicts <= {*NO_RECORD}:
        return "Nothing to compare with"
    return "Same" if verdicts == {Verdict.SAME} else OUTCOME[comparison.status]


def _counted(comparison: Comparison) -> str:
    """How many cases got which verdict, and how many of them were compared token by token."""
    counts = Counter(entry.verdict for entry in comparison.entries if entry.verdict is not None)
    total = plural(counts.total(), "case")
    if shown := len(comparison.entries) - counts.total():
        total += f" judged, {shown:,} only shown"
    paired = f"{comparison.paired:,} compared token by token."
    if set(counts) == {Verdict.SAME}:
        paired = "Every figure is equal."
    elif not comparison.paired:
        paired = "**Nothing was paired: values only.**"
    return f"{total}: {words(counts)}. {paired}"


def _by_kind(entries: Sequence[Entry]) -> list[str]:
    """One bullet for each of quality, memory, speed and behaviour with its verdicts."""
    groups = grouped(entries, lambda entry: kind(entry.case))
    counts = {name: Counter(entry.verdict for entry in own if entry.verdict) for name, own in groups.items()}
    order = (QUALITY, MEMORY, SPEED, BEHAVIOUR)
    return [f"- {name.capitalize()}: {words(counts[name])}." for name in order if counts.get(name)]


def _word(entry: Entry | None) -> str:
    return str(entry.verdict) if entry and entry.verdict else NOTHING


def _values(entry: Entry) -> list[str]:
    """A's value and B's with their unit; a time as its ratio to the reference that was timed in turn with it."""
    metric, family, unit = entry.case.metric, entry.case.family, entry.b.unit or entry.a.unit
    shown = []
    for row in (entry.a, entry.b):
        value = row.value
        if value is None:
            shown.append(str(Verdict.MISSING))
        elif family == "memory":
            shown.append(f"{mib(value)} MiB")
        elif family == "latency":
            plain = entry.case.method == entry.case.reference or in_turn(entry.b, entry.a)
            shown.append(f"{milliseconds(value)} ms" if plain else to_reference(row))
        elif metric == "perplexity":
            shown.append(perplexity(value))
        else:
            shown.append(f"{number(value)} {escape(unit)}".rstrip())
    return shown


def change(entry: Entry) -> str:
    """B over A (or B minus A) with its interval."""
    if entry.change is None:
        return NOTHING
    if entry.is_ratio:
        return ratio(*(exp(value) for value in (entry.change, entry.low, entry.high)))
    return number(entry.change)


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
        lines = []
        for step in steps:
            counts = words(Counter(entry.verdict for entry in step.comparison.entries if entry.verdict))
            names = escape(f"{sides[step.before].label} -> {sides[step.after].label}")
            lines.append(f"- {names}: **{OUTCOME[step.comparison.status].lower()}** ({counts})")
        parts.append("\n".join(lines))
    parts += ["## What did not load or run", _failures(sides)]
    parts += ["## Environment", f"On {escape(where)}. {_packages(sides)}"]
    every = list(dict.fromkeys(entry.case for step in steps for entry in step.comparison.entries))
    families = grouped(every, lambda case: case.family)
    if quality := [case for case in families.get("perplexity", ()) if case.metric != "perplexity.delta"]:
        parts += ["## Quality", _table(sides, steps, quality, lambda value: f"{value:.4f}")]
    if sizes := families.get("memory"):
        parts += ["## Memory in bytes", _table(sides, steps, sizes, lambda value: f"{value:,.0f}")]
    for metric, cases in grouped(families.get("latency", ()), lambda case: case.metric).items():
        parts += [f"## Speed: {metric.partition('.')[2]}, milliseconds", _table(sides, steps, cases, milliseconds)]
    if behaved := families.get(INVARIANT):
        parts += ["## Behaviour", _behaviour(sides, steps, behaved)]
    parts += ["## How it was measured", HOW, code_block(command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _failures(sides: Sequence[SideFacts]) -> str:
    lines = []
    for side in sides:
        if side.trouble:
            lines.append(f"- {escape(side.label)}: {escape(side.trouble)}")
            continue
        missing = [row for row in side.rows.values() if row.missing]
        for reason, rows in grouped(missing, lambda row: row.reason).items():
            names = ", ".join(dict.fromkeys(f"{row.model} {row.method}" for row in rows))
            lines.append(f"- {escape(side.label)}: {plural(len(rows), 'case')} ({escape(names)}): {escape(reason)}")
    return "\n".join(lines) or "Everything planned ran on every side (a layer that raises stands under *Behaviour*)."


def _packages(sides: Sequence[SideFacts]) -> str:
    known = [side.packages for side in sides if side.packages]
    names = sorted({name for packages in known for name in packages})
    versions = {name: [packages.get(name, "absent") for packages in known] for name in names}
    moved = [f"{code(name)}: {escape(' -> '.join(v))}" for name, v in versions.items() if len(set(v)) > 1]
    equal = plural(len(names) - len(moved), "package")
    return bullets(f"{equal} equal on every side; not equal:", moved or ["none"])


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
    headers = ["model", "method", "what", *_arrows(sides, steps, "change [95%]")]
    return table(headers, lines, words=(0, 1, 2))


def _arrows(sides: Sequence[SideFacts], steps: Sequence[Step], alone: str) -> list[str]:
    """The headers of the sides' columns and of the steps'; that of a single step is `alone`."""
    labels = [side.label for side in sides]
    short = [label.rpartition("==")[2] for label in labels]
    arrows = [escape(f"{short[step.before]} -> {short[step.after]}") for step in steps]
    return [*map(escape, labels), *(arrows if len(steps) > 1 else [alone])]


def _moved(entry: Entry | None) -> str:
    if entry is None or entry.verdict is None:
        return NOTHING
    if entry.verdict in (Verdict.SAME, Verdict.MISSING) or entry.change is None:
        return str(entry.verdict)
    a, b = entry.a.value, entry.b.value
    if entry.case.family == "memory" and a is not None and b is not None:
        return f"{b - a:+,.0f} ({100 * (b / a - 1):+.2f}%) {entry.verdict}"
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
        moved = [_word(found.get(case)) for found in entries]
        own = {str(row.detail["fault"]): str(row.detail["reference"]) for row in rows if row and "fault" in row.detail}
        faults |= own
        known = ", ".join(map(code, own)) or NOTHING
        line = (code(case.metric.partition(".")[2]), code(case.method), *map(escape, looks), *moved, known)
        groups.setdefault(line, []).append(case.model)
    kept = len(cases) - sum(len(models) for models in groups.values())
    opening = f"{kept:,} of {plural(len(cases), 'check')} hold on every side."
    if not groups:
        return opening
    lines = [[line[0], line[1], ", ".join(map(code, models)), *line[2:]] for line, models in groups.items()]
    headers = ["invariant", "method", "on", *_arrows(sides, steps, "verdict"), "known fault"]
    listed = table(headers, lines, words=range(len(headers)))
    parts = [f"{opening} The others (a figure where one is over its limit):", listed]
    if faults:
        told = (f"{code(name)}: {escape(reference)}" for name, reference in faults.items())
        parts.append(bullets("Known faults, and where they are told:", told))
    return "\n\n".join(parts)


def worst(steps: Sequence[Step]) -> int:
    """The exit status over every step: harm before undecided before fine."""
    return min((step.comparison.status for step in steps), key=(1, 3, 0).index)


def answer(comparison: Comparison, before: str, after: str, where: str) -> str:
    """What moves between the two ends, and what to do."""
    entries = comparison.entries
    # equal shas of the losses are a pairing of every token too
    tokens = sum(entry.paired or bool(entry.a.nll and entry.a.nll == entry.b.nll) for entry in entries)
    families = grouped(entries, lambda entry: entry.case.family)
    absent = [entry for entry in entries if entry.a.missing or entry.b.missing]
    gone = f"{plural(len(absent), 'case')} did not run on both sides ({_methods(absent)}), see below."
    sentences = [
        f"**Moving from {escape(before)} to {escape(after)} {WORDS[comparison.status]}** on {escape(where)}, over "
        f"{plural(len(entries), 'case')}, {tokens:,} of them compared token by token.",
        _quality([entry for entry in entries if entry.case.metric == "perplexity"]),
        _memory(families.get("memory", ())),
        *_speed(families.get("latency", ())),
        _invariants(families.get(INVARIANT, ())),
        gone if absent else "",
        _advice(comparison),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _methods(entries: Iterable[Entry]) -> str:
    return ", ".join(code(name) for name in dict.fromkeys(entry.case.method for entry in entries))


def _interval(entry: Entry) -> str:
    if entry.change is None:
        return ""
    if entry.low is None or entry.high is None:
        return f" {percent(entry.change)}"
    return f" {percent(entry.change)} [{percent(entry.low)}, {percent(entry.high)}]"


def _quality(entries: Sequence[Entry]) -> str:
    parts = []
    for verdict in (Verdict.INPUT_CHANGED, Verdict.WORSE, Verdict.UNUSABLE, Verdict.BETTER):
        moved = [e for e in entries if e.verdict is verdict]
        each = ", ".join(f"{code(e.case.method)} on {code(e.case.model)}{_interval(e)}" for e in moved)
        parts += [f"{verdict} for {each}"] if moved else []
    if rest := [entry for entry in entries if entry.verdict in (Verdict.WITHIN_NOISE, Verdict.SAME)]:
        largest = max(abs(entry.change or 0.0) for entry in rest)
        equal = _methods(entry for entry in rest if entry.verdict is Verdict.SAME)
        exactly = f"; bit for bit for {equal}" if equal else ""
        unchanged = f"unchanged within noise for {_methods(rest)}"
        parts.append(f"{unchanged} (at most {100 * math.expm1(largest):.2g}%{exactly})")
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
    sentences = []
    for metric, timed in grouped(entries, lambda entry: entry.case.metric).items():
        parts = []
        for verdict, word in ((Verdict.WORSE, "slower"), (Verdict.BETTER, "faster")):
            each = [
                f"{code(e.case.method)} {math.exp(abs(e.change)):.3g} times on {code(e.case.model)}"
                for e in timed
                if e.verdict is verdict and e.change is not None
            ]
            parts += [f"{word} for {', '.join(each)}"] if each else []
        if rest := [entry for entry in timed if entry.verdict in (Verdict.WITHIN_NOISE, Verdict.SAME)]:
            parts.append(f"within noise for {_methods(rest)}")
        if wide := [entry for entry in timed if entry.verdict is Verdict.UNUSABLE]:
            parts.append(f"not decided for {_methods(wide)}")
        sentences.append(f"{metric.partition('.')[2].capitalize()}: {'; '.join(parts)}.")
    return sentences


def _invariants(entries: Sequence[Entry]) -> str:
    if not entries:
        return ""
    parts = []
    for verdict, said in ((Verdict.WORSE, "no longer {}"), (Verdict.BETTER, "{} again")):
        if moved := [entry for entry in entries if entry.verdict is verdict]:
            state = said.format("holds" if len(moved) == 1 else "hold")
            checks = grouped(moved, lambda entry: entry.case.metric.partition(".")[2])
            named = []
            for whose, same in grouped(checks.items(), lambda check: _methods(check[1])).items():
                named.append(f"{', '.join(code(name) for name, _ in same)} ({whose})")
            parts.append(f"{plural(len(moved), 'check')} {state}: {'; '.join(named)}")
    kept = sum(entry.verdict in (Verdict.SAME, Verdict.WITHIN_NOISE) for entry in entries)
    return f"Behaviour: {'; '.join([*parts, f'{kept:,} are as they were'])}."


def _advice(comparison: Comparison) -> str:
    worse = [entry for entry in comparison.entries if entry.verdict is Verdict.WORSE]
    if comparison.status == 0:
        return "Nothing here speaks against moving."
    if comparison.status == 3:
        return "Before moving, decide what is open: raise `--repetitions` or `--max-tokens`, or mend what did not run."
    known = [entry for entry in worse if entry.b.detail.get("fault")]
    new = [entry for entry in worse if entry.case.family == INVARIANT and not entry.b.detail.get("fault")]
    sentences = ["Before moving, make sure that nothing you do meets what is worse."]
    if known:
        counts = f"{len(known):,} of the {len(worse):,} harms are known faults"
        sentences.append(f"{counts}, each with its reference below.")
    if new:
        checks = ", ".join(code(entry.case.metric) for entry in new[:5])
        sentences.append(f"Not known before: {_methods(new)} ({checks}).")
    return " ".join(sentences)
