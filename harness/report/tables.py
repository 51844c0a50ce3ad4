"""The tables of one section: a main one per text, then perplexity's relatives, memory, latency and census in full.

A time belongs to its moment: of two methods only their ratios to the reference compare, each timed in turn with it.

What a line of the main table says is here as numbers too (`MethodLine`), for the page and for other programs: for each
of quality, memory and speed a ratio to the reference and a verdict, so that a good perplexity does not hide behind a
latency that compares with nothing.

Ratios of times: to the reference, and to the unquantized model in the dtype in which a method itself runs.

On a card methods run in fp16 beside a reference in fp32, so that a ratio of their times holds dtype and quantization
together. Where the unquantized model was timed in that dtype too, the ratio to it is the quotient of both ratios to the
reference: ln(a / b) = ln(a / r) - ln(b / r), with r timed beside each in interleaved blocks of its own process. The
interval joins theirs by the square root of the sum of squares (MOVER: Zou and Donner 2008), the two being independent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from harness.core.records import Row
from harness.core.stats import Estimate
from harness.core.text import NOTHING, exp, mib, milliseconds, number, perplexity, ratio
from harness.core.values import decode_number
from harness.judge.rules import log_ratio
from harness.report.account import (
    MEMORY,
    MISSING,
    NO_TEXT,
    QUALITY,
    SPEED,
    Decision,
    Section,
    Text,
    decide,
    grouped,
    kind,
)
from harness.report.markup import code, escape, table

ASPECTS = (QUALITY, MEMORY, SPEED)  # each with a verdict of its own, so that none hides behind another
ALIGNED, NO_INTERVAL = "†", "‡"  # footnote marks
SIZES = ("parameters", "footprint", "storage", "storage_after", "load_peak", "run_peak", "file")
IN_MAIN = ("perplexity", "perplexity.delta")  # shown in the main table, not among the others

Cell = Callable[[str], str]  # of a method
Column = tuple[str, Cell]  # with its header
DTYPE = re.compile(r":dtype=(\w+)")  # as a method id writes it


def main(section: Section, text: Text) -> str:
    """Quality, memory, speed: perplexity and its ratio, bits and MiB, paired ratios of times; a verdict for each."""

    def judged_on(name: str) -> Cell:
        return lambda method: judged([row for row in section.rows(method, (text, NO_TEXT)) if kind(row.case) == name])

    size = next((name for name in ("memory.storage", "memory.footprint") if name in section.metrics(NO_TEXT)), "")
    columns: list[Column] = [
        ("perplexity", _values(section, "perplexity", text, perplexity)),
        ("ratio to reference [95%]", lambda method: quality(section, method, text)),
        ("bits/weight", lambda method: number(bits(section, method))),
        (f"{size.partition('.')[2]} MiB", _values(section, size, NO_TEXT, mib)),
        *((f"{name.partition('.')[2]} / reference [95%]", speed(section, name)) for name in timed(section)),
        *((name, judged_on(name)) for name in ASPECTS),
    ]
    return by_method(section, columns, verdicts=3)


def timed(section: Section) -> tuple[str, ...]:
    """The two timed measures worth a column: prefill and decode where they are, else what there is."""
    return tuple(section.timed.values())[:2]


def speed(section: Section, metric: str) -> Cell:
    """A method's time over that of the reference beside it; the reference's own milliseconds stand this once."""

    def cell(method: str) -> str:
        row = section.row(method, metric)
        if row is None or row.value is None:
            return shown(row, milliseconds)
        return f"1 ({milliseconds(row.value)} ms)" if method == section.reference else to_reference(row)

    return cell


def _cells(section: Section, metric: str, text: Text, write: Callable[[Row | None], str]) -> Cell:
    """The cells of a column that shows something of one metric's rows."""
    return lambda method: write(section.row(method, metric, text))


def _values(section: Section, metric: str, text: Text, write: Callable[[float | None], str]) -> Cell:
    """The cells of a column that shows one metric's values."""
    return _cells(section, metric, text, lambda row: shown(row, write))


def by_method(section: Section, columns: Sequence[Column], *, verdicts: int = 1) -> str:
    """One line a method that has anything to show, and so with columns; the last of them hold `verdicts`."""
    filled = [(header, [cell(method) for method in section.methods]) for header, cell in columns]
    kept = [item for item in filled if any(text != NOTHING for text in item[1])]
    rows = [
        [label(section, method), *(cells[index] for _, cells in kept)]
        for index, method in enumerate(section.methods)
        if any(cells[index] != NOTHING for _, cells in kept)
    ]
    worded = sum(item in filled[-verdicts:] for item in kept)
    return table(["method", *(header for header, _ in kept)], rows, words=(0, *range(-worded, 0)))


def label(section: Section, method: str) -> str:
    """The method's name, marked where it is the reference or its codes fit the model's stored grid."""
    marks = (" (reference)" if method == section.reference else "") + (f" {ALIGNED}" if section.aligned(method) else "")
    return code(method) + marks


def shown(row: Row | None, write: Callable[[float | None], str]) -> str:
    """A row's value; 'missing' where it was planned and has none, unless it was left out."""
    if row is None or row.left_out:
        return NOTHING
    return MISSING if row.value is None else write(row.value)


def quality(section: Section, method: str, text: Text) -> str:
    """Perplexity over the reference's, with the interval where there is one."""
    if method == section.reference:
        return "1" if section.value(method, "perplexity", text) is not None else NOTHING
    row = section.row(method, "perplexity.delta", text)
    if row is not None and row.value is None:
        return shown(row, perplexity)
    low, high = interval(row)
    shown_ratio = ratio(quality_ratio(section, method, text), exp(low), exp(high))
    return shown_ratio + (f" {NO_INTERVAL}" if shown_ratio != NOTHING and "[" not in shown_ratio else "")


def quality_ratio(section: Section, method: str, text: Text) -> float | None:
    """Exp of the paired difference; without one, the quotient of the two perplexities."""
    delta = section.value(method, "perplexity.delta", text)
    if delta is not None:
        return exp(delta)
    own, reference = (section.value(name, "perplexity", text) for name in (method, section.reference))
    return own / reference if own is not None and reference else None


def interval(row: Row | None) -> tuple[float | None, float | None]:
    """A row's interval where both ends are finite numbers and the metric does not call it unusable."""
    if row is None or row.interval is None or row.detail.get("usable") is False:
        return None, None
    return row.interval if all(map(math.isfinite, row.interval)) else (None, None)


def bits(section: Section, method: str) -> float | None:
    """Bits per weight of a method, scales counted."""
    rows = section.rows(method, (*section.texts, NO_TEXT))
    return next((row.bits_per_weight for row in rows if row.bits_per_weight is not None), None)


def verdict(rows: Sequence[Row], *, by_metric: bool = False) -> str:
    """The most severe verdict, with the metric families (or metrics) it comes from unless all rows share it."""
    if not rows:
        return NOTHING
    worst = min((row.verdict for row in rows), key=lambda verdict: verdict.severity)
    found = [row for row in rows if row.verdict is worst]
    names = dict.fromkeys(row.metric.partition(".")[2] or row.metric if by_metric else row.case.family for row in found)
    return str(worst) if len(found) == len(rows) else f"{worst} ({escape(', '.join(names))})"


def judged(rows: Sequence[Row]) -> str:
    """The most severe verdict of both comparisons; behind it how many cases had no record to be compared with."""
    found = decide(rows)
    if found is None:
        return NOTHING
    return str(found.verdict) + (f" ({found.aside})" if found.aside else "")


def footnotes(section: Section, text: Text) -> list[str]:
    """What the marks of the main table mean, and what is known of the model; bullets."""
    lines = []
    if any(map(section.aligned, section.methods)):
        lines.append(
            f"- {ALIGNED} Its codes can represent the grid on which this model's weights were stored before: what it "
            "loses here says little about weights that were never quantized."
        )
    if any(quality(section, method, text).endswith(NO_INTERVAL) for method in section.methods):
        lines.append(f"- {NO_INTERVAL} No interval: not paired, fewer than 8 windows, or a value that is not finite.")
    notes = (ratio_note(section, metric, NO_TEXT) for metric in timed(section))
    lines += [f"- {note}" for note in dict.fromkeys(notes) if note]
    return lines


def memory(section: Section) -> str:
    """The memory family in MiB, and storage as a share of the reference's; "" where none was planned."""
    present = section.metrics(NO_TEXT, "memory")
    if not present:
        return ""
    names = [f"memory.{name}" for name in SIZES if f"memory.{name}" in present]
    names += [name for name in present if name not in names]

    def share(method: str) -> str:
        own, reference = (section.value(name, "memory.storage") for name in (method, section.reference))
        return number(own / reference if own is not None and reference else None, 3)

    def judged(method: str) -> str:
        rows = [row for row in section.rows(method, (NO_TEXT,)) if row.case.family == "memory"]
        return verdict(rows, by_metric=True)

    columns: list[Column] = [
        (name.partition(".")[2].replace("_", " ") + " MiB", _values(section, name, NO_TEXT, mib)) for name in names
    ]
    return by_method(section, [*columns, ("storage / reference", share), ("verdict", judged)])


def latency(section: Section, metric: str, text: Text) -> str:
    """One timed measure: ratios with intervals, then p50, its reference's, p90, p99 and IQR in ms, runs, verdict."""

    def cells(write: Callable[[Row | None], str]) -> Cell:
        return _cells(section, metric, text, write)

    def seconds(name: str) -> Cell:
        return cells(lambda row: milliseconds(detail(row, name)))

    def within(name: str) -> Cell:
        return cells(lambda row: to_plain(row, section.row(name, metric, text)))

    mixed, plain = other_dtypes(section, metric, text)
    window = any(detail(section.row(method, metric, text), "device_tokens") for method in section.methods)
    columns: list[Column] = [
        (f"ratio to {escape(section.reference) if mixed else 'reference'} [95%]", cells(to_reference)),
        *((f"ratio to {name} [95%]", within(name)) for name in plain),
        ("p50 ms", _values(section, metric, text, milliseconds)),
        ("p50 ms of the reference beside it", seconds("reference_p50")),
        ("p90 ms", seconds("p90")),
        ("p99 ms", seconds("p99")),
        ("IQR ms", cells(lambda row: milliseconds(row.spread if row else None))),
        ("device ms of a window" if window else "device ms", seconds("device_seconds")),
        ("runs", cells(lambda row: str(row.count) if row and row.value is not None else NOTHING)),
        # where a cluster timed it; of a session on one machine nothing is said
        ("node", cells(lambda row: escape(str(row.detail["node"])) if row and row.detail.get("node") else NOTHING)),
        ("verdict", cells(lambda row: verdict([row] if row else []))),
    ]
    return by_method(section, columns)


def others(section: Section, text: Text) -> str:
    """Every further metric of a text (or of none), one column a metric with its unit; "" where there is none."""
    names = [
        name
        for name in section.metrics(text)
        if name not in IN_MAIN and name.partition(".")[0] not in ("latency", "memory")
    ]
    if not names:
        return ""

    def header(metric: str) -> str:
        rows = (section.row(method, metric, text) for method in section.methods)
        unit = next((row.unit for row in rows if row is not None and row.unit), "")
        return escape(f"{metric} ({unit})" if unit else metric)

    def estimate(row: Row | None) -> str:
        low, high = interval(row)
        return shown(row, number) + ("" if low is None else f" [{number(low)}, {number(high)}]")

    def quantile(at: str) -> Cell:
        return _cells(section, "divergence.kl", text, lambda row: number(detail(row, at)))

    def judged(method: str) -> str:
        return verdict([row for name in names if (row := section.row(method, name, text))])

    columns: list[Column] = [(header(name), _cells(section, name, text, estimate)) for name in names]
    if "divergence.kl" in names:  # a mean hides single tokens
        columns += [(f"kl {at} (nat)", quantile(at)) for at in ("p99", "max")]
    return by_method(section, [*columns, ("verdict", judged)])


def census(section: Section) -> str:
    """Modules and elements quantized and left, and bytes by dtype, of each method; "" where no census was taken."""
    taken: dict[str, Mapping[str, Any]] = {}
    for row in section.cells.values():
        if row.census:
            taken.setdefault(row.method, row.census)
    if not taken:
        return ""

    def count(method: str, name: str) -> str:
        value = taken.get(method, {}).get(name)
        return f"{value:,}" if isinstance(value, int) else NOTHING

    def share(method: str) -> str:
        found = taken.get(method, {}).get("matrices")
        return f"{found['share']:.1%}" if isinstance(found, dict) else NOTHING

    def by_dtype(method: str) -> str:
        sizes = taken.get(method, {}).get("bytes_by_dtype")
        if not isinstance(sizes, dict):
            return NOTHING
        return ", ".join(f"{escape(str(name))} {mib(size)}" for name, size in sizes.items())

    columns: list[Column] = [
        ("modules quantized", lambda method: count(method, "quantized_modules")),
        ("weights quantized", lambda method: count(method, "quantized_elements")),
        ("parameters left", lambda method: count(method, "left_elements")),
        ("bits/weight", lambda method: number(bits(section, method) if method in taken else None)),
        ("MiB by dtype", by_dtype),
    ]
    if any("matrices" in known for known in taken.values()):  # reports of older harnesses have none
        columns.insert(3, ("of what its scope names", share))
    return by_method(section, columns)


def detail(row: Row | None, name: str) -> float | None:
    """A number of a row's detail, None where there is none."""
    value = decode_number(row.detail.get(name)) if row is not None else None
    return float(value) if isinstance(value, (int, float)) else None


def to_reference(row: Row | None) -> str:
    """Time over the reference's, with its interval; for the reference itself its A/A comparison."""
    found = time_ratio(row)
    shown = NOTHING if found is None else ratio(exp(found.value), exp(found.low), exp(found.high))
    if row is None or row.method != row.reference or row.value is None:
        return shown
    return "1" if shown == NOTHING else f"A/A {shown}"


def to_plain(row: Row | None, plain: Row | None) -> str:
    """Time over that of the unquantized model in the same dtype, from both ratios to the reference."""
    if row is None or plain is None or row.value is None or dtype(row) != dtype(plain):
        return NOTHING
    if row.method == plain.method:
        return "1"
    ours, theirs = time_ratio(row), time_ratio(plain)
    if ours is None or theirs is None:
        return NOTHING
    value = ours.value - theirs.value
    below = math.hypot(ours.value - ours.low, theirs.high - theirs.value)
    above = math.hypot(ours.high - ours.value, theirs.value - theirs.low)
    return ratio(exp(value), exp(value - below), exp(value + above))


def dtype(row: Row | None) -> str:
    """The dtype in which a row's method ran, '' where it does not say."""
    match = DTYPE.search(row.method_id) if row is not None else None
    return match[1] if match else ""


def other_dtypes(section: Section, metric: str, text: Text) -> tuple[list[str], list[str]]:
    """The dtypes, other than the reference's, in which methods ran that are more than a cast to it.

    Then those of them in which the unquantized model was timed too.
    """
    rows = [row for method in section.methods if (row := section.row(method, metric, text))]
    ids = (str(row.detail.get("reference_id", "")) for row in rows)
    named = next((match[1] for name in ids if (match := DTYPE.search(name))), section.reference)
    reference = dtype(section.row(section.reference, metric, text)) or named
    mixed = list(dict.fromkeys(name for row in rows if (name := dtype(row)) not in ("", reference, row.method)))
    return mixed, [name for name in mixed if time_ratio(section.row(name, metric, text))]


def ratio_note(section: Section, metric: str, text: Text) -> str:
    """What a reader must know of ratios across dtypes; '' where there are none."""
    mixed, plain = other_dtypes(section, metric, text)
    if not mixed:
        return ""
    reference, absent = code(section.reference), [code(name) for name in mixed if name not in plain]
    note = f"Methods ran in {' and '.join(mixed)}: the ratio to {reference} is of dtype and quantization together."
    if plain:
        note += (
            f" The ratio to {' and to '.join(map(code, plain))} is of quantization alone: the quotient of two ratios "
            f"to {reference}, each timed in a process of its own; its interval joins theirs."
        )
    if absent:
        note += f" Measure {' and '.join(absent)} too for a ratio within one dtype."
    return note


def time_ratio(row: Row | None) -> Estimate | None:
    """The log of a row's time over the reference's; its interval is infinite where it may not decide."""
    value = detail(row, "log_ratio")
    if row is None or value is None or not math.isfinite(value):
        return None
    return log_ratio(row.detail) or Estimate(value, -math.inf, math.inf, 0, False)


def decisions(rows: Iterable[Row]) -> dict[str, Decision]:
    """For each aspect that was planned its verdict."""
    own = grouped(rows, lambda row: kind(row.case))
    return {name: found for name in ASPECTS if (found := decide(own.get(name, ())))}


class MethodLine(NamedTuple):
    """A line of the main table: a model under a method on one text. Its bytes and times repeat on each text."""

    section: Section
    method: str
    text: Text
    rows: tuple[Row, ...]

    @property
    def key(self) -> tuple[str, str, str, str, Text]:
        """What tells it from every other line."""
        return self.section.model, self.section.device, self.section.reference, self.method, self.text

    @property
    def is_reference(self) -> bool:
        """Whether its method is what the others are held against."""
        return self.method == self.section.reference


def lines(section: Section) -> Iterator[MethodLine]:
    """The lines of a section: for each text (or once, where there is none) every method that was planned."""
    cells = grouped(section.cells.values(), lambda row: (row.method, (row.dataset, row.protocol)))
    for text in section.texts or (NO_TEXT,):
        for method in section.methods:
            own = cells.get((method, text), []) if text != NO_TEXT else []
            if rows := (*own, *cells.get((method, NO_TEXT), ())):
                yield MethodLine(section, method, text, rows)


class Factor(NamedTuple):
    """A ratio to the reference, with its 95% interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def words(self) -> str:
        """As every table of the report writes it."""
        return ratio(self.value, self.low, self.high)


def loss(line: MethodLine) -> Factor | None:
    """Perplexity over the reference's on the same tokens."""
    section, method, text = line.section, line.method, line.text
    if line.is_reference:
        return Factor(1.0) if section.value(method, "perplexity", text) is not None else None
    value = quality_ratio(section, method, text)
    low, high = interval(section.row(method, "perplexity.delta", text))
    return None if value is None else Factor(value, exp(low), exp(high))


def share(line: MethodLine) -> Factor | None:
    """Storage over the reference's, exact."""
    own, reference = (line.section.value(name, "memory.storage") for name in (line.method, line.section.reference))
    return Factor(own / reference) if own is not None and reference else None


def timed_row(line: MethodLine, metric: str) -> Row | None:
    """A timed measure of a line: of its text where that is read, else of the model."""
    return line.section.row(line.method, metric, line.text) or line.section.row(line.method, metric)


def pace(line: MethodLine, metric: str) -> Factor | None:
    """Time over the reference's, from the blocks of one run in which both were timed; of the reference its A/A."""
    row = timed_row(line, metric)
    found = time_ratio(row) if row is not None and row.value is not None else None
    if found is None:
        return None
    low, high = (exp(end) if math.isfinite(end) else None for end in (found.low, found.high))
    return Factor(exp(found.value) or 0.0, low, high)
