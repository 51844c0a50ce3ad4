"""A comparison as markdown that also reads in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from harness.core.records import Case, Verdict
from harness.core.text import NOTHING, exp, mib, milliseconds, number, perplexity, plural, ratio
from harness.judge.two_reports import HARM, UNDECIDED, Comparison, Entry
from harness.report.account import SHOWN, words
from harness.report.markup import code, escape, table

OUTCOME = {0: "No harm", 1: "Harm", 3: "Undecided"}


def render_comparison(comparison: Comparison, *, name_a: str = "A", name_b: str = "B") -> str:
    """The outcome, what needs a look, the environment difference, and one table a model, device and text."""
    entries = comparison.entries
    counts = Counter(entry.verdict for entry in entries if entry.verdict is not None)
    judged = sum(counts.values())
    total = plural(judged, "case")
    if shown := len(entries) - judged:
        total += f" judged, {shown:,} only shown"
    paired = (
        f"{comparison.paired:,} compared token by token."
        if comparison.paired
        else "**Nothing was paired: values only.**"
    )
    parts = [
        f"# {escape(name_a)} against {escape(name_b)}",
        f"**{OUTCOME[comparison.status]}**: {total}: {words(counts)}. {paired}",
    ]
    for verdicts in (HARM, UNDECIDED):
        found = [entry for entry in entries if entry.verdict in verdicts]
        if found:
            parts.append("\n".join(_bullet(entry) for entry in found[:SHOWN]) + _more(found))
    parts += [f"Note: {escape(note)}" for note in comparison.notes]
    parts.append(_environment(comparison.environment))
    parts += _tables(entries)
    parts += [
        f"Only in {escape(name)}: {plural(len(cases), 'case')} ({_names(cases)})."
        for name, cases in ((name_a, comparison.only_a), (name_b, comparison.only_b))
        if cases
    ]
    parts.append(
        "Change is B / A (B - A for metrics that are no ratio), with a 95% interval where one could be had: Student's "
        "t over windows for perplexity; for time, whose change is that of its ratio to the reference in the same "
        "session, the two sessions' intervals combined. Each interval is of 95% by itself, not corrected for the "
        "number of cases: of twenty that did not move, one may lie beyond its noise floor. Lower is better. MiB is "
        "2^20 bytes."
    )
    return "\n\n".join(parts) + "\n"


def _bullet(entry: Entry) -> str:
    case = entry.case
    text = f", {code(case.dataset)} {code(case.protocol)}" if case.dataset else ""
    where = f"{code(case.model)}, {code(case.method)}{text}, {code(case.metric)}"
    moved = change(entry)
    return f"- **{entry.verdict}**: {where}{f': {moved}' if moved != NOTHING else ''}: {escape(entry.reason)}"


def _more(found: Sequence[Entry]) -> str:
    return f"\n- … and {len(found) - SHOWN:,} more, in the tables." if len(found) > SHOWN else ""


def _names(cases: Sequence[Case]) -> str:
    names = list(dict.fromkeys(f"{case.model}, {case.method}" for case in cases))
    return "; ".join(escape(name) for name in names[:SHOWN]) + ("; …" if len(names) > SHOWN else "")


def _environment(lines: Sequence[str]) -> str:
    if not lines:
        return "Environment: no recorded difference."
    return "Environment difference:\n\n" + "\n".join(f"- {escape(line)}" for line in lines)


def _tables(entries: Sequence[Entry]) -> list[str]:
    groups: dict[tuple[str, str, str, str], list[Entry]] = {}
    for entry in entries:
        case = entry.case
        groups.setdefault((case.model, case.device, case.dataset, case.protocol), []).append(entry)
    parts = []
    for (model, device, dataset, protocol), found in groups.items():
        text = f": {code(dataset)}, {code(protocol)}" if dataset else ""
        lines = [
            [
                code(entry.case.method),
                code(entry.case.metric),
                _value(entry, entry.a.value),
                _value(entry, entry.b.value),
                change(entry),
                str(entry.verdict or NOTHING),
            ]
            for entry in found
        ]
        headers = ["method", "metric", "A", "B", "change [95%]", "verdict"]
        parts += [f"## {code(model)} on {escape(device)}{text}", table(headers, lines, words=(0, 1, -1))]
    return parts


def _value(entry: Entry, value: float | None) -> str:
    if value is None:
        return str(Verdict.MISSING)
    family, unit = entry.case.family, entry.b.unit or entry.a.unit
    if family == "memory":
        return f"{mib(value)} MiB"
    if family == "latency":
        return f"{milliseconds(value)} ms"
    shown = perplexity(value) if entry.case.metric == "perplexity" else number(value)
    return f"{shown} {escape(unit)}" if unit and entry.case.metric != "perplexity" else shown


def change(entry: Entry) -> str:
    """B over A (or B minus A) with its interval."""
    if entry.change is None:
        return NOTHING
    if entry.is_ratio:
        return ratio(*(exp(value) for value in (entry.change, entry.low, entry.high)))
    return number(entry.change)
