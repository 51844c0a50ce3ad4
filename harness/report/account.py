"""What was planned, ran, is missing and why; which baselines served; under which protocols and in which environments.

Every verdict by itself: both comparisons, the change, the smallest effect that could have been seen, the look-up.
Rows and plan are sorted here into what tables and plots ask for: one section a model, device and reference.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from harness.core.environment import Environment
from harness.core.records import Case, Row, Verdict
from harness.core.text import NOTHING, percent, plural
from harness.core.values import decode_number, flatten
from harness.judge.two_reports import INVARIANT, holds, seen
from harness.report.markup import bullets, code, escape, table

FAILING = (Verdict.MISSING, Verdict.OUT_OF_BOUND, Verdict.WORSE)  # what a session fails on, whatever its options
OPEN = (Verdict.UNUSABLE, Verdict.NOT_COMPARABLE, Verdict.UNRECORDED)  # nothing could be decided
METHOD_FILE = re.compile(r"(?<=/)[^/@\s]+(?=@\S*\.yaml\b|\.yaml\b)")  # the method in a baseline file's name
NAMED = 20  # models, texts or metrics of the opening sentence
SOME = 6  # of them that still fit a line
NO_REASON = "no reason was given"
SHOWN = 10  # lines of one list before it is cut; the account below the tables has them all
LIMITS = """\
*Against the record*: a change of the recorded figure, for losses and times in percent with its 95% interval, paired
token by token; *smallest effect* is what nine of ten sessions with this spread would have called, and of an exact
figure the smallest step. At most 5% of sessions in which nothing changed raise an alarm: every test has its share of
it, and Holm's step-down settles the session. A perplexity against the reference is exact on this text: no test."""
MOVED = (Verdict.WORSE, Verdict.BETTER)


def headline(rows: Sequence[Row], planned: Sequence[Case]) -> str:
    """One paragraph on the outcome, then what failed; `rows` are complete."""
    mine = rows[: len(set(planned))]  # what answers the plan comes first
    if not mine:
        return "**Nothing was measured: no case was planned.**"
    ran, counts = measured(mine), Counter(row.verdict for row in mine)
    harm = [f"{counts[verdict]:,} {verdict}" for verdict in FAILING if counts[verdict]]
    opening = f"No harm: {ran:,} of {plural(len(mine), 'planned case')} ran, none is out of bound or worse."
    if not ran:
        opening = f"Nothing was measured: 0 of {plural(len(mine), 'planned case')} ran."
    elif harm:
        opening = f"Harm: {', '.join(harm)}."
    tally = f"Planned {len(mine):,}, ran {ran:,}, missing {len(mine) - ran:,}."

    def named(field: str) -> str:
        return some((getattr(case, field) for case in planned), NAMED)

    methods = {case.method for case in planned if case.method != case.reference}
    texts, devices = named("dataset"), ", ".join(dict.fromkeys(case.device for case in planned))
    where = f" on {texts} under {named('protocol')}" if texts else ""
    against = f"{plural(len(methods), 'method')} against {named('reference')}"
    intended = f"Planned: {against} for {named('model')}{where}; {named('family')}; on {devices}."
    lines = [f"**{opening}** {intended}", "", f"{tally} Verdicts: {words(counts)}."]
    failed = [row for row in mine if row.verdict in FAILING and row.verdict is not Verdict.MISSING]
    lines += ["", *failures(failed[:SHOWN])] if failed else []
    if len(failed) > SHOWN:
        lines.append(f"- … and {len(failed) - SHOWN:,} more, in the account below.")
    return "\n".join(lines)


def measured(rows: Iterable[Row]) -> int:
    """How many rows have a value."""
    return sum(row.value is not None for row in rows)


def words(counts: Mapping[Verdict, int]) -> str:
    """Verdicts and how many, most severe first."""
    return ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in Verdict if counts.get(verdict)) or "none"


def some(values: Iterable[str], most: int = SOME) -> str:
    """The first different values as names, and how many more there are."""
    unique = [value for value in dict.fromkeys(values) if value]
    more = f" and {len(unique) - most:,} more" if len(unique) > most else ""
    return ", ".join(map(code, unique[:most])) + more


def place(case: Case) -> str:
    """Where a figure stands: model, method, text, metric."""
    text = f", {code(case.dataset)} {code(case.protocol)}" if case.dataset else ""
    return f"{code(case.model)}, {code(case.method)}{text}, {code(case.metric)}"


def measure(case: Case) -> str:
    """What was measured: the metric, and the text where there is one."""
    return code(case.metric) + (f" {code(case.dataset)} {code(case.protocol)}" if case.dataset else "")


def failures(rows: Iterable[Row]) -> list[str]:
    """One bullet a row with its verdict and reason."""
    return [
        f"- **{row.verdict}**: {place(row.case)} ({escape(row.device)}): {escape(row.reason) or NO_REASON}"
        for row in rows
    ]


def account(rows: Sequence[Row], planned: Sequence[Case]) -> str:
    """Planned, ran, missing and why, then every row that failed and what stayed open; `rows` are complete."""
    mine = rows[: len(set(planned))]
    lines = []
    for (model, device), own in grouped(mine, lambda row: (row.model, row.device)).items():
        ran = measured(own)
        numbers = [f"{count:,}" for count in (len(own), ran, len(own) - ran)]
        lines.append([code(model), escape(device), *numbers, words(Counter(row.verdict for row in own))])
    headers = ["model", "device", "planned", "ran", "missing", "verdicts"]
    parts = [table(headers, lines, words=(0, 1, -1)) if mine else "No case was planned."]
    if missing := [row for row in mine if row.value is None]:
        parts.append("Missing, by reason:\n\n" + "\n".join(by_reason(missing)))
    if failed := [row for row in mine if row.verdict in FAILING and row.value is not None]:
        parts.append("Failed:\n\n" + "\n".join(failures(failed)))
    undecided = [row for row in mine if row.verdict in OPEN and row.value is not None]
    if unrecorded := [row for row in undecided if row.verdict is Verdict.UNRECORDED and not row.live]:
        parts.append(
            f"Unrecorded: {plural(len(unrecorded), 'case')} ({some(row.model for row in unrecorded)}; "
            f"{some(row.metric for row in unrecorded)}). To record them, run the command at the end of this report "
            "with `--regen-all`."
        )
    if undecided := [row for row in undecided if row.verdict is not Verdict.UNRECORDED]:
        parts.append("Not decided, by reason:\n\n" + "\n".join(by_reason(undecided)))
    if extra := len(rows) - len(mine):
        parts.append(f"{plural(extra, 'row')} of an earlier plan stand in the tables and are not counted here.")
    return "\n\n".join(parts)


def by_reason(rows: Sequence[Row]) -> list[str]:
    """One bullet a verdict and reason (baseline files of all methods as one): how many cases, of which methods."""
    groups = grouped(rows, lambda row: (row.verdict, METHOD_FILE.sub("*", row.reason)))
    lines = []
    for (verdict, reason), own in sorted(groups.items(), key=lambda item: (item[0][0].severity, -len(item[1]))):
        methods, metrics = some(row.method for row in own), some(row.metric for row in own)
        whose = f"{some(row.model for row in own)}: {methods}; {metrics}"
        lines.append(f"- {plural(len(own), 'case')} {verdict}: {escape(reason) or NO_REASON} ({whose})")
    return lines


def baselines(rows: Sequence[Row]) -> str:
    """Which recorded files served for which rows, methods folded to '*'."""
    ran = [row for row in rows if row.value is not None]
    groups = grouped(ran, lambda row: METHOD_FILE.sub("*", row.baseline))
    none = len(groups.pop("", []))
    parts = []
    if groups:
        lines = [
            [
                code(name),
                f"{len({row.baseline for row in found}):,}",
                f"{len(found):,}",
                some(row.metric for row in found),
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
    """Protocol ids and token hashes, then the weights' revisions or content hashes.

    Two under one short name are said to be two (and, if asked, no other is said).
    """
    read = [row for row in rows if row.protocol_id or row.token_hash]
    texts = grouped(read, lambda row: (row.model, row.dataset, row.protocol))
    groups = {place: grouped(own, lambda row: (row.protocol_id, row.token_hash)) for place, own in texts.items()}
    lines = []
    if clashes_only and (left := sum(len(found) == 1 for found in groups.values())):
        told = "ids and token hashes in measurements.jsonl."
        lines.append(f"- {plural(left, 'text')} of a model under a protocol: {told}")
        groups = {place: found for place, found in groups.items() if len(found) > 1}
    for (model, dataset, protocol), found in groups.items():
        name = f"{code(dataset)} under {code(protocol)} for {code(model)}"
        if len(found) > 1:
            lines.append(f"- **{name} stands for {len(found)} different token plans, which do not compare:**")
        for (protocol_id, token_hash), served in found.items():
            tokens = next((row.detail["tokens"] for row in served if isinstance(row.detail.get("tokens"), int)), None)
            count = f", {plural(tokens, 'token')}" if tokens is not None else ""
            lines.append(f"- {name}: {escape(protocol_id)}; token ids sha256 {code(token_hash)}{count}")
    parts = ["\n".join(lines) or "No text was read."]
    if known := dict.fromkeys((row.model, row.revision) for row in rows if row.revision):
        weights = [f"{code(model)}: {code(revision)}" for model, revision in known]
        parts.append(bullets("Weights, by commit or content:", weights))
    return "\n\n".join(parts)


def environments(rows: Sequence[Row], known: Mapping[str, Mapping[str, Any]]) -> str:
    """The worlds that the rows were measured in, side by side, one line a field."""
    used = Counter(row.environment for row in rows if row.value is not None and row.environment)
    if not used:
        return "Nothing was measured, so no environment was recorded."
    parts = [f"{code(name)} is not in environments.json." for name in used if name not in known]
    if worlds := {name: flatten(known[name]) for name in used if name in known}:
        order = [item.name for item in fields(Environment)]  # a file's keys come back sorted: the same order always
        there = {name for world in worlds.values() for name in world}
        names = [name for name in order if name in there] + sorted(there.difference(order))
        lines = [[escape(name), *(escape(of.get(name, "")) or NOTHING for of in worlds.values())] for name in names]
        headers = ["field", *(f"{code(name)} ({plural(used[name], 'row')})" for name in worlds)]
        parts.insert(0, table(headers, lines, words=range(len(headers))))
    return "\n\n".join(parts)


def verdicts(rows: Sequence[Row]) -> str:
    """One line a measured case; "" where none was measured."""
    found = [row for row in rows if row.value is not None]
    if not found:
        return ""
    lines = [
        [
            code(row.model),
            code(row.method),
            measure(row.case),
            str(row.verdict_reference or NOTHING),
            str(row.verdict_baseline or NOTHING),
            change(row),
            escape(str(row.detail.get("smallest", ""))) or NOTHING,
            code(row.baseline) if row.baseline else NOTHING,
        ]
        for row in found
    ]
    headers = ["model", "method", "metric", "against the reference", "against the record"]
    headers += ["change [95%]", "smallest effect", "looked up in"]
    parts = [LIMITS, table(headers, lines, words=(0, 1, 2, 3, 4, -1)), *stopped(found), *differences(found)]
    return "\n\n".join(parts)


def change(row: Row) -> str:
    """The change against the record in percent, with its interval."""
    limits: Any = row.detail.get("change")
    if not isinstance(limits, Mapping):
        return NOTHING
    value, low, high = (percent(float(decode_number(limits[name]))) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def stopped(rows: Sequence[Row]) -> list[str]:
    """What early-stopped cases read, and what they know: bullets."""
    lines = []
    for row in rows:
        if "tokens_used" in row.detail and row.interval is not None:
            used, available = row.detail["tokens_used"], row.detail["tokens_available"]
            why = f"; {escape(row.detail['why_whole'])}" if row.detail.get("why_whole") else ""
            end = (
                f"stopped at '{row.detail['decided']}' with {row.interval[0]:+.5f} to {row.interval[1]:+.5f} nat"
                if row.stopped_early
                else "undecided before its end"
            )
            lines.append(
                f"{code(row.model)}, {code(row.method)}: {used:,} of {available:,} tokens used "
                f"({100 * used / available:.0f}%), {end}{why}"
            )
    return [bullets("Read early (`--stop-early`), windows in their seeded order:", lines)] if lines else []


def differences(rows: Sequence[Row]) -> list[str]:
    """How the record's environment differs from this one, line by line, wherever something moved or may not compare."""
    moved = [
        row
        for row in rows
        if (lines := row.detail.get("environment_difference")) is not None
        and (row.verdict_baseline in MOVED or (lines and row.verdict_baseline is Verdict.NOT_COMPARABLE))
    ]
    parts = []
    for lines, own in grouped(moved, lambda row: tuple(row.detail["environment_difference"])).items():
        names = ", ".join(dict.fromkeys(f"{code(row.method)} {code(row.metric)}" for row in own))
        itself = any("itself moved" in row.reason for row in own)
        blamed = " The unquantized reference itself moved." if itself else ""
        head = f"Recorded in another environment than {plural(len(own), 'case')} that moved or may not compare "
        if lines:
            parts.append(bullets(f"{head}({names}):{blamed}", map(escape, lines)))
        else:
            head = f"Recorded in this very environment, and moved ({names}): no version or processor did it."
            parts.append(head + blamed)
    return parts


def invariants(rows: Sequence[Row]) -> str:
    """What a session's report says of its invariants; "" where it measured none."""
    checks = [row for row in rows if row.case.family == INVARIANT]
    if not checks:
        return ""
    wrong = [row for row in checks if row.value is None or not holds(row) or row.verdict is Verdict.BETTER]
    if not wrong:
        return f"All of {plural(len(checks), 'check')} hold."
    kept = f"{len(checks) - len(wrong):,} of {plural(len(checks), 'check')} hold."
    lines = [
        [code(row.method), code(row.model), code(row.metric), escape(seen(row)), str(row.verdict), escape(row.reason)]
        for row in wrong
    ]
    listed = table(["method", "on", "invariant", "seen", "verdict", "why"], lines, words=range(6))
    return f"{kept} Those that do not, and known faults that are gone:\n\n{listed}"


Text = tuple[str, str]  # dataset, protocol
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
NO_TEXT: Text = ("", "")
NEVER = "never reached: the session ended before it"
MOST_CASES = 5_000  # of one report with every table: some 2 MB of markdown, more than code hosts render


@dataclass(frozen=True)
class Section:
    """What was planned and measured for one model on one device against one reference."""

    model: str
    device: str
    reference: str
    methods: tuple[str, ...]  # the reference first, then in plan order
    texts: tuple[Text, ...]
    cells: Mapping[tuple[str, str, Text], Row]  # by method, metric, text

    def row(self, method: str, metric: str, text: Text = NO_TEXT) -> Row | None:
        """The row of a cell, None where nothing was planned."""
        return self.cells.get((method, metric, text))

    def value(self, method: str, metric: str, text: Text = NO_TEXT) -> float | None:
        """The measured value, None where there is none."""
        row = self.row(method, metric, text)
        return None if row is None else row.value

    def rows(self, method: str, texts: Iterable[Text]) -> list[Row]:
        """Every row of a method under the given texts."""
        wanted = set(texts)
        return [row for text, row in self.by_method.get(method, ()) if text in wanted]

    @functools.cached_property
    def by_method(self) -> Mapping[str, Sequence[tuple[Text, Row]]]:
        """The cells of each method, in plan order: a table asks for them line by line."""
        cells = grouped(self.cells.items(), lambda cell: cell[0][0])
        return {method: [(text, row) for (_, _, text), row in own] for method, own in cells.items()}

    def metrics(self, text: Text, family: str = "") -> tuple[str, ...]:
        """The metrics planned for a text (of one family), in plan order."""
        found = dict.fromkeys(metric for _, metric, where in self.cells if where == text)
        return tuple(metric for metric in found if not family or metric.partition(".")[0] == family)

    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the model, e.g. how its weights were stored."""
        return tuple(dict.fromkeys(str(note) for row in self.cells.values() if (note := row.detail.get("model_note"))))

    def aligned(self, method: str) -> bool:
        """Whether the method's codes can represent the grid on which the model's weights already lie."""
        rows = (row for _, row in self.by_method.get(method, ()))
        return any(row.detail.get("grid_aligned") is True or row.census.get("grid_aligned") is True for row in rows)


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by what they have in common, groups and items in the order met."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def finite(value: float | None) -> bool:
    """Whether there is a number to draw."""
    return value is not None and math.isfinite(value)


def complete(rows: Sequence[Row], planned: Sequence[Case]) -> tuple[Row, ...]:
    """One row a case: the planned in plan order (`missing` where no row came), then what no plan holds any more."""
    by_case = {row.case: row for row in rows}  # as `latest`: the last stands, where the first stood
    wanted = dict.fromkeys(planned)
    answered = [by_case.get(case) or Row.of(case, verdict=Verdict.MISSING, reason=NEVER) for case in wanted]
    return (*answered, *(row for case, row in by_case.items() if case not in wanted))


def sections(rows: Sequence[Row]) -> tuple[Section, ...]:
    """Group complete rows; sections, methods, texts and metrics keep the order of the rows."""
    found = []
    for key, own in grouped(rows, lambda row: (row.model, row.device, row.reference)).items():
        cells = {(row.method, row.metric, (row.dataset, row.protocol)): row for row in own}
        methods = sorted(dict.fromkeys(method for method, _, _ in cells), key=lambda method: method != key[2])
        texts = dict.fromkeys(text for _, _, text in cells if text[0])
        found.append(Section(*key, tuple(methods), tuple(texts), cells))
    return tuple(found)
