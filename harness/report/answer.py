"""One paragraph on an upgrade that a release manager can act on, made of the comparison alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from harness.records import Verdict
from harness.report.writing import code, escape
from harness.text import percent, plural
from harness.two_reports import INVARIANT, Comparison, Entry

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
