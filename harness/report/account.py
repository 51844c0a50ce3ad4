"""What was planned, ran, is missing and why; the answer in one sentence, and every verdict by itself.

Every verdict by itself: both comparisons, the change, the smallest effect that could have been seen, the look-up.
One verdict of many rows: the most severe of what was decided, so that what has no record does not hide it.
Rows and plan are sorted here into what tables and plots ask for: one section a model, device and reference.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from harness.core.records import Case, Row, Verdict
from harness.core.text import NOTHING, percent, plural
from harness.core.values import decode_number
from harness.judge.two_reports import INVARIANT, holds, seen
from harness.methods.quantizing.arguments import LEAST, left_out
from harness.report.markup import bullets, code, escape, table

# what a session fails on unless an option permits it
FAILING = (Verdict.MISSING, Verdict.INPUT_CHANGED, Verdict.OUT_OF_BOUND, Verdict.WORSE)
NO_RECORD = (Verdict.NOT_COMPARABLE, Verdict.UNRECORDED)  # there was nothing to compare with
OPEN = (Verdict.UNUSABLE, *NO_RECORD)  # nothing could be decided
# compared with a record; an invariant with its own limit
SETTLED = (Verdict.WORSE, Verdict.BETTER, Verdict.WITHIN_NOISE, Verdict.SAME, Verdict.WITHIN_BOUND)
KINDS = {"memory": "memory", "latency": "speed", INVARIANT: "behaviour"}  # of a metric family; the others are quality
QUALITY, MEMORY, SPEED, BEHAVIOUR = "quality", "memory", "speed", "behaviour"
METHOD_FILE = re.compile(r"(?<=/)[^/@\s]+(?=@\S*\.yaml\b|\.yaml\b)")  # the method in a baseline file's name
NAMED = 20  # models, texts or metrics of the opening sentence
SOME = 6  # of them that still fit a line
NO_REASON = "no reason was given"
MISSING, LEFT = "missing", "left out"  # without a value: to be measured yet, or never to be had
SHOWN = 10  # lines of one list before it is cut; the account below the tables has them all
MOVED = (Verdict.WORSE, Verdict.BETTER)


def headline(rows: Sequence[Row], planned: Sequence[Case]) -> str:
    """One paragraph on the outcome, quality and memory before speed, then what failed; `rows` are complete."""
    mine = rows[: len(set(planned))]  # what answers the plan comes first
    if not mine:
        return f"**{opening(mine)}**"

    def named(field: str) -> str:
        return some((getattr(case, field) for case in planned), NAMED)

    methods = {case.method for case in planned if case.method != case.reference}
    texts, devices = named("dataset"), ", ".join(dict.fromkeys(case.device for case in planned))
    where = f" on {texts} under {named('protocol')}" if texts else ""
    against = f"{plural(len(methods), 'method')} against {named('reference')}"
    intended = f"Planned: {against} for {named('model')}{where}; {named('family')}; on {devices}."
    lines = [f"**{opening(mine)}** {intended} {tally_of(mine).capitalize()}.", "", *by_kind(mine)]
    failed = [row for row in mine if failing(row) and row.verdict is not Verdict.MISSING]
    lines += ["", *failures(failed[:SHOWN])] if failed else []
    if len(failed) > SHOWN:
        lines.append(f"- … and {len(failed) - SHOWN:,} more, in the account below.")
    return "\n".join(lines)


def failing(row: Row) -> bool:
    """Whether a session fails on it, unless an option permits it."""
    lost = row.verdict is Verdict.UNUSABLE and bool(row.detail.get("reference_non_finite"))
    return lost or row.verdict in FAILING


class Decision(NamedTuple):
    """A verdict and the row that it comes from; how many comparisons beside it had no record, and their word."""

    verdict: Verdict
    row: Row
    alone: int = 0
    word: Verdict | None = None

    @property
    def aside(self) -> str:
        """'2 unrecorded' beside a verdict that was decided without them."""
        return f"{self.alone} {self.word}" if self.alone and self.verdict is not self.word else ""


def decide(rows: Iterable[Row]) -> Decision | None:
    """The decision of rows, each against the reference and against the record; None of no row."""
    found: list[tuple[Verdict, Row]] = []
    for row in rows:
        own = [verdict for verdict in (row.verdict_reference, row.verdict_baseline) if verdict]
        if not own or (row.verdict in FAILING and row.verdict not in own):  # as a changed fact, decided by neither
            own.append(row.verdict)
        found += [(word, row) for word in own]
    if not found:
        return None
    alone = [item for item in found if item[0] in NO_RECORD]
    decided = [item for item in found if item[0] not in NO_RECORD]
    verdict, row = min(decided or alone, key=lambda item: item[0].severity)
    word = min((item[0] for item in alone), key=lambda verdict: verdict.severity, default=None)
    return Decision(verdict, row, len(alone), word)


def opening(rows: Sequence[Row]) -> str:
    """The outcome in one sentence: what failed; else what was compared, and what could not be; `rows` answer the plan.

    A time belongs to its machine, so that it decides nothing here where anything else was measured.
    """
    ran, counts = measured(rows), Counter(row.verdict for row in rows)
    if not rows:
        return "Nothing was measured: no case was planned."
    if not ran:
        return f"Nothing was measured: 0 of {plural(len(rows), 'planned case')} ran."
    harm = [f"{counts[verdict]:,} {verdict}" for verdict in FAILING if counts[verdict]]
    if broken := sum(bool(row.detail.get("reference_non_finite")) for row in rows if row.verdict is Verdict.UNUSABLE):
        harm.append(f"{broken:,} beside a reference that is not finite")
    if harm:
        return f"Harm: {', '.join(harm)}."
    lasting = [row for row in rows if kind(row.case) != SPEED and not row.left_out] or rows
    records = Counter(against_record(row) for row in lasting)
    compared, alone = (sum(records[verdict] for verdict in kinds) for kinds in (SETTLED, NO_RECORD))
    bounded = sum(row.verdict_reference is Verdict.WITHIN_BOUND for row in lasting)
    where = " on this machine" if records[Verdict.NOT_COMPARABLE] else ""
    bounds = f"; within their bounds: {bounded:,}" if bounded else ""
    if alone and not compared:
        return f"Nothing to compare with: {plural(alone, 'case')} {_have(alone)} no record{where}{bounds}."
    undecided = f" Undecided: {counts[Verdict.UNUSABLE]:,}." if counts[Verdict.UNUSABLE] else ""
    if alone:
        kept = f"No harm in the {plural(compared, 'case')} that {_have(compared)} a record"
        return f"{kept}; {alone:,} {_have(alone)} none{where}{bounds}.{undecided}"
    if not compared and not bounded:
        return f"Nothing was decided: {plural(ran, 'case')} ran."
    planned = plural(len(rows), "planned case")
    return f"No harm: {ran:,} of {planned} ran, none is out of bound or worse.{undecided}"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def kind(case: Case) -> str:
    """What a figure speaks of: quality, memory, speed or behaviour."""
    return KINDS.get(case.family, QUALITY)


def against_record(row: Row) -> Verdict | None:
    """The verdict against the record; of a row that does not hold both apart, its only one."""
    return row.verdict_baseline or (row.verdict if row.verdict_reference is None else None)


def by_kind(rows: Sequence[Row]) -> list[str]:
    """One bullet for each of quality, memory, speed and behaviour: how many cases got which word, by comparison."""
    groups = grouped(rows, lambda row: kind(row.case))
    lines = []
    for name in (QUALITY, MEMORY, SPEED, BEHAVIOUR):
        if own := groups.get(name):
            ran = [row for row in own if row.value is not None]
            counts = tally(own)
            parts = [f"{name} {counts[name]:,}" for name in (MISSING, LEFT) if counts.get(name)]
            if bounded := Counter(row.verdict_reference for row in ran if row.verdict_reference):
                parts.append(f"against the reference {words(bounded)}")
            if recorded := Counter(verdict for row in ran if (verdict := against_record(row))):
                parts.append(f"against the record {words(recorded)}")
            lines.append(f"- {name.capitalize()}, {plural(len(own), 'case')}: {'; '.join(parts)}.")
    return lines


def measured(rows: Iterable[Row]) -> int:
    """How many rows have a value."""
    return sum(row.value is not None for row in rows)


def tally(rows: Sequence[Row]) -> dict[str, int]:
    """How many cases were planned, ran and are missing, by these words; and were left out, where any was."""
    counts = {"planned": len(rows), "ran": measured(rows), MISSING: sum(row.missing for row in rows)}
    left = sum(row.left_out for row in rows)
    return {**counts, LEFT: left} if left else counts


def tally_of(rows: Sequence[Row]) -> str:
    """'planned 5, ran 4, missing 1'."""
    return ", ".join(f"{name} {count:,}" for name, count in tally(rows).items())


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
    """Planned, ran, missing or left out and why, every row that failed, what stayed open; "" where nothing did."""
    mine = rows[: len(set(planned))]
    lines, names = [], tuple(tally(mine))
    for (model, device), own in grouped(mine, lambda row: (row.model, row.device)).items():
        counts = tally(own)
        numbers = [f"{counts.get(name, 0):,}" for name in names]
        lines.append([code(model), escape(device), *numbers, words(Counter(row.verdict for row in own))])
    headers = ["model", "device", *names, "verdicts"]
    parts = [table(headers, lines, words=(0, 1, -1))] if len(lines) > 1 else []  # of one the headline has told
    if missing := [row for row in mine if row.missing]:
        parts.append("Missing, by reason:\n\n" + "\n".join(by_reason(missing)))
    if left := [row for row in mine if row.left_out]:
        parts.append("Left out, by reason:\n\n" + "\n".join(by_reason(left)))
    failed = [row for row in mine if failing(row) and row.value is not None]
    if len(failed) > SHOWN:  # fewer stand at the top
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
    groups = grouped(rows, lambda row: (row.verdict, METHOD_FILE.sub("*", cause(row))))
    lines = []
    for (verdict, reason), own in sorted(groups.items(), key=lambda item: (item[0][0].severity, -len(item[1]))):
        methods, metrics = some(row.method for row in own), some(row.metric for row in own)
        whose = f"{some(row.model for row in own)}: {methods}; {metrics}"
        lines.append(f"- {plural(len(own), 'case')} {verdict}: {escape(reason) or NO_REASON} ({whose})")
    return lines


def cause(row: Row) -> str:
    """Why a row is what it is; of one that compares with nothing, not what its bound says too."""
    return row.reason.partition("; ")[0] if row.verdict is Verdict.NOT_COMPARABLE else row.reason


def baselines(rows: Sequence[Row]) -> str:
    """Which recorded files served how many rows and with what verdicts, methods folded to '*'; bullets."""
    ran = [row for row in rows if row.value is not None]
    groups = grouped(ran, lambda row: METHOD_FILE.sub("*", row.baseline))
    none = len(groups.pop("", []))
    lines = []
    for name, found in sorted(groups.items()):
        files = plural(len({row.baseline for row in found}), "file")
        counts = words(Counter(row.verdict_baseline for row in found if row.verdict_baseline))
        lines.append(f"- {code(name)} ({files}) served {plural(len(found), 'row')}: {counts}")
    if none:
        lines.append(f"- No record served {plural(none, 'row')}: judged against the reference only")
    return "\n".join(lines)


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
    parts = [table(headers, lines, words=(0, 1, 2, 3, 4, -1)), *stopped(found), *differences(found)]
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
TIMED = ("latency.prefill", "latency.decode", "latency.forward", "latency.generate", "latency.evaluation")
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

    @functools.cached_property
    def timed(self) -> Mapping[str, str]:
        """Of each timed measure that reads no text the metric to show."""
        return by_measure(self.metrics(NO_TEXT, "latency"))

    def protocol(self, text: Text) -> str:
        """A text's protocol: the one asked for, and the one that was run where the model reads less at once."""
        run = self.run_as.get(text)
        return text[1] + (f" run as {', '.join(run)}" if run else "")

    @functools.cached_property
    def run_as(self) -> Mapping[Text, Mapping[str, None]]:
        """Of each text whose protocol was run as another, which."""
        found: dict[Text, dict[str, None]] = {}
        for (_, _, text), row in self.cells.items():
            if row.run_as:
                found.setdefault(text, {})[row.run_as] = None
        return found

    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the model, e.g. how its weights were stored, and what a method did not reach."""
        stored = [str(note) for row in self.cells.values() if (note := row.detail.get("model_note"))]
        return tuple(dict.fromkeys((*stored, *(note for row in self.cells.values() if (note := unreached(row))))))

    def aligned(self, method: str) -> bool:
        """Whether the method's codes can represent the grid on which the model's weights already lie."""
        rows = (row for _, row in self.by_method.get(method, ()))
        return any(row.detail.get("grid_aligned") is True or row.census.get("grid_aligned") is True for row in rows)


def unreached(row: Row) -> str:
    """What a method left of the weights that its scope names, where that is more than a twentieth; '' elsewhere."""
    found: Any = row.census.get("matrices")
    if not isinstance(found, dict) or found["share"] >= LEAST:
        return ""
    return (
        f"{row.method} quantized {found['share']:.1%} of the weights that its scope names and left {left_out(found)}; "
        "its bits per weight count both"
    )


def by_measure(metrics: Iterable[str]) -> dict[str, str]:
    """Of each timed measure, in the order of TIMED, the metric to show: without arguments where it is, else the first.

    'latency.decode' is answered by 'latency.decode:prompt=2048' where that alone was planned.
    """
    found: dict[str, str] = {}
    for metric in sorted(metrics, key=lambda name: ":" in name):
        found.setdefault(metric.partition(":")[0], metric)
    return {name: found[name] for name in TIMED if name in found}


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
