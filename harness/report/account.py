"""What was planned, ran, is missing and why; which baselines served; under which protocols and in which worlds."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from harness.core.environment import Environment
from harness.core.records import Case, Row, Verdict
from harness.core.text import plural
from harness.core.values import flatten
from harness.report.markup import code, escape, table
from harness.report.matrix import of_plan

FAILING = (Verdict.MISSING, Verdict.OUT_OF_BOUND, Verdict.WORSE)  # what a session fails on, whatever its options
OPEN = (Verdict.UNUSABLE, Verdict.NOT_COMPARABLE, Verdict.UNRECORDED)  # nothing could be decided
METHOD_FILE = re.compile(r"(?<=/)[^/@\s]+(?=@\S*\.yaml\b|\.yaml\b)")  # the method in a baseline file's name
NAMED = 20  # models, texts or metrics of the opening sentence
SHOWN = 10  # lines of one list before it is cut; the account below the tables has them all


def headline(rows: Sequence[Row], planned: Sequence[Case]) -> str:
    """One paragraph on the outcome, then what failed; `rows` are complete."""
    mine = of_plan(rows, planned)
    if not mine:
        return "**Nothing was measured: no case was planned.**"
    ran = sum(row.value is not None for row in mine)
    counts = Counter(row.verdict for row in mine)
    harm = [f"{counts[verdict]:,} {verdict}" for verdict in FAILING if counts[verdict]]
    opening = (
        f"Nothing was measured: 0 of {plural(len(mine), 'planned case')} ran."
        if not ran
        else f"Harm: {', '.join(harm)}."
        if harm
        else f"No harm: {ran:,} of {plural(len(mine), 'planned case')} ran, none is out of bound or worse."
    )
    lines = [f"**{opening}** {measured(planned)}", "", f"{tally(mine)} Verdicts: {words(counts)}."]
    failed = [row for row in mine if row.verdict in FAILING and row.verdict is not Verdict.MISSING]
    lines += ["", *failures(failed[:SHOWN])] if failed else []
    if len(failed) > SHOWN:
        lines.append(f"- … and {len(failed) - SHOWN:,} more, in the account below.")
    return "\n".join(lines)


def measured(planned: Sequence[Case]) -> str:
    """What the session set out to measure, in a sentence."""

    def names(values: Iterable[str]) -> str:
        unique = [code(value) for value in dict.fromkeys(values) if value]
        more = f" and {len(unique) - NAMED:,} more" if len(unique) > NAMED else ""
        return ", ".join(unique[:NAMED]) + more

    every = dict(zip(Case._fields, map(dict.fromkeys, zip(*planned, strict=True)), strict=True))
    methods = {
        method for method, reference in {(case.method, case.reference) for case in planned} if method != reference
    }
    texts = names(every["dataset"])
    where = f" on {texts} under {names(every['protocol'])}" if texts else ""
    return (
        f"Planned: {plural(len(methods), 'method')} against {names(every['reference'])} for {names(every['model'])}"
        f"{where}; {names(metric.partition('.')[0] for metric in every['metric'])}; on {', '.join(every['device'])}."
    )


def tally(rows: Sequence[Row]) -> str:
    """'Planned 12, ran 10, missing 2.'."""
    ran = sum(row.value is not None for row in rows)
    return f"Planned {len(rows):,}, ran {ran:,}, missing {len(rows) - ran:,}."


def words(counts: Mapping[Verdict, int]) -> str:
    """Verdicts and how many, most severe first."""
    return ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in Verdict if counts.get(verdict)) or "none"


def place(row: Row) -> str:
    """Where a row stands: model, method, text, metric, device."""
    text = f", {code(row.dataset)} {code(row.protocol)}" if row.dataset else ""
    return f"{code(row.model)}, {code(row.method)}{text}, {code(row.metric)} ({escape(row.device)})"


def failures(rows: Iterable[Row]) -> list[str]:
    """One bullet a row with its verdict and reason."""
    return [f"- **{row.verdict}**: {place(row)}: {escape(row.reason) or 'no reason was given'}" for row in rows]


def account(rows: Sequence[Row], planned: Sequence[Case]) -> str:
    """Planned, ran, missing and why, then every row that failed and what stayed open; `rows` are complete."""
    mine = of_plan(rows, planned)
    parts = [_counts(mine)] if mine else ["No case was planned."]
    if missing := [row for row in mine if row.value is None]:
        parts.append("Missing, by reason:\n\n" + "\n".join(by_reason(missing)))
    if failed := [row for row in mine if row.verdict in FAILING and row.value is not None]:
        parts.append("Failed:\n\n" + "\n".join(failures(failed)))
    undecided = [row for row in mine if row.verdict in OPEN and row.value is not None]
    if unrecorded := [row for row in undecided if row.verdict is Verdict.UNRECORDED]:
        parts.append(
            f"Unrecorded: {plural(len(unrecorded), 'case')} ({_some(row.model for row in unrecorded)}; "
            f"{_some(row.metric for row in unrecorded)}). To record them, run the command at the end of this report "
            "with `--regen-all`."
        )
    if undecided := [row for row in undecided if row.verdict is not Verdict.UNRECORDED]:
        parts.append("Not decided, by reason:\n\n" + "\n".join(by_reason(undecided)))
    if extra := len(rows) - len(mine):
        parts.append(f"{plural(extra, 'row')} of an earlier plan stand in the tables and are not counted here.")
    return "\n\n".join(parts)


def _counts(rows: Sequence[Row]) -> str:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.device), []).append(row)
    lines = []
    for (model, device), found in groups.items():
        ran = sum(row.value is not None for row in found)
        numbers = [f"{count:,}" for count in (len(found), ran, len(found) - ran)]
        lines.append([code(model), *numbers, words(Counter(row.verdict for row in found)), escape(device)])
    order = [[line[0], line[-1], *line[1:-1]] for line in lines]
    return table(["model", "device", "planned", "ran", "missing", "verdicts"], order, words=(0, 1, -1))


def by_reason(rows: Sequence[Row]) -> list[str]:
    """One bullet a verdict and reason (baseline files of all methods as one): how many cases, of which methods."""
    groups: dict[tuple[Verdict, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.verdict, METHOD_FILE.sub("*", row.reason)), []).append(row)
    lines = []
    for (verdict, reason), found in sorted(groups.items(), key=lambda item: (item[0][0].severity, -len(item[1]))):
        methods = _some(row.method for row in found)
        metrics = _some(row.metric for row in found)
        models = _some(row.model for row in found)
        told = escape(reason) or "no reason was given"
        lines.append(f"- {plural(len(found), 'case')} {verdict}: {told} ({models}: {methods}; {metrics})")
    return lines


def _some(values: Iterable[str]) -> str:
    unique = list(dict.fromkeys(values))
    more = f" and {len(unique) - 6:,} more" if len(unique) > 6 else ""  # six names still fit a line
    return ", ".join(code(value) for value in unique[:6]) + more


def baselines(rows: Sequence[Row]) -> str:
    """Which recorded files served for which rows, methods folded to '*'."""
    groups: dict[str, list[Row]] = {}
    pattern = functools.cache(functools.partial(METHOD_FILE.sub, "*"))
    for row in rows:
        if row.value is not None:
            groups.setdefault(pattern(row.baseline), []).append(row)
    none = len(groups.pop("", []))
    parts = []
    if groups:
        lines = [
            [
                code(name),
                f"{len({row.baseline for row in found}):,}",
                f"{len(found):,}",
                _some(row.metric for row in found),
                words(Counter(row.verdict_baseline for row in found if row.verdict_baseline)),
            ]
            for name, found in sorted(groups.items())
        ]
        headers = ["baseline files", "files", "rows", "metrics", "verdicts against it"]
        parts.append(table(headers, lines, words=(0, 3, 4)))
    if none:
        parts.append(f"No baseline served {plural(none, 'row')}: judged against the reference only.")
    return "\n\n".join(parts) or "Nothing was measured, so no baseline served."


def protocols(rows: Sequence[Row], *, clashes_only: bool = False) -> str:
    """Protocol ids and token hashes; two under one short name are said to be two (and, if asked, no other is said)."""
    groups: dict[tuple[str, str, str], dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        if row.protocol_id or row.token_hash:
            key = (row.model, row.dataset, row.protocol)
            groups.setdefault(key, {}).setdefault((row.protocol_id, row.token_hash), []).append(row)
    lines = []
    if clashes_only and (left := sum(len(found) == 1 for found in groups.values())):
        lines.append(
            f"- {plural(left, 'text')} of a model under a protocol: ids and token hashes in measurements.jsonl."
        )
        groups = {place: found for place, found in groups.items() if len(found) > 1}
    for (model, dataset, protocol), found in groups.items():
        name = f"{code(dataset)} under {code(protocol)} for {code(model)}"
        if len(found) > 1:
            lines.append(f"- **{name} stands for {len(found)} different token plans, which do not compare:**")
        for (protocol_id, token_hash), served in found.items():
            tokens = next((row.detail["tokens"] for row in served if isinstance(row.detail.get("tokens"), int)), None)
            count = f", {plural(tokens, 'token')}" if tokens is not None else ""
            lines.append(f"- {name}: {escape(protocol_id)}; token ids sha256 {code(token_hash)}{count}")
    return "\n".join(lines) or "No text was read."


def revisions(rows: Sequence[Row]) -> str:
    """The resolved revision or content hash of every model measured."""
    found = dict.fromkeys((row.model, row.revision) for row in rows if row.revision)
    return "\n".join(f"- {code(model)}: {code(revision)}" for model, revision in found)


def environments(rows: Sequence[Row], known: Mapping[str, Mapping[str, Any]]) -> str:
    """The worlds that the rows were measured in, side by side, one line a field."""
    used = Counter(row.environment for row in rows if row.value is not None and row.environment)
    if not used:
        return "Nothing was measured, so no environment was recorded."
    parts = [f"{code(name)} is not in environments.json." for name in used if name not in known]
    if told := [name for name in used if name in known]:
        flat = {name: flatten(known[name]) for name in told}
        order = [item.name for item in fields(Environment)]  # a file's keys come back sorted: the same order always
        named = {name for facts in flat.values() for name in facts}
        names = sorted(named, key=lambda name: (order.index(name) if name in order else len(order), name))
        lines = [[escape(field), *(escape(flat[name].get(field, "")) or "–" for name in told)] for field in names]
        headers = ["field", *(f"{code(name)} ({plural(used[name], 'row')})" for name in told)]
        parts.insert(0, table(headers, lines, words=range(len(headers))))
    return "\n\n".join(parts)
