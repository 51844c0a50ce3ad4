"""The tables of one section: a main one per text, then perplexity's relatives, memory, latency and census in full."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from harness.core.records import Row
from harness.core.text import NOTHING, exp, mib, milliseconds, number, perplexity, ratio
from harness.report import paces
from harness.report.markup import code, escape, table
from harness.report.matrix import NO_TEXT, Section, Text, severest

MISSING = "missing"
ALIGNED, NO_INTERVAL = "†", "‡"  # footnote marks
MEMORY = ("parameters", "footprint", "storage", "storage_after", "load_peak", "run_peak", "file")
IN_MAIN = ("perplexity", "perplexity.delta")  # shown in the main table, not among the others

Column = tuple[str, Callable[[str], str]]  # header, and the cell of a method


def main(section: Section, text: Text) -> str:
    """Method, perplexity, ratio to the reference, bits per weight, footprint, storage, prefill, decode, verdict."""

    def figure(metric: str, write: Callable[[float | None], str], where: Text = NO_TEXT) -> Callable[[str], str]:
        return lambda method: shown(section.row(method, metric, where), write)

    columns: list[Column] = [
        ("perplexity", figure("perplexity", perplexity, text)),
        ("ratio to reference [95%]", lambda method: quality(section, method, text)),
        ("bits/weight", lambda method: number(bits(section, method))),
        ("footprint MiB", figure("memory.footprint", mib)),
        ("storage MiB", figure("memory.storage", mib)),
        ("prefill ms", figure("latency.prefill", milliseconds)),
        ("decode ms", figure("latency.decode", milliseconds)),
        ("verdict", lambda method: verdict(section.rows(method, (text, NO_TEXT)))),
    ]
    return by_method(section, columns)


def by_method(section: Section, columns: Sequence[Column]) -> str:
    """One line a method that has anything to show; so with columns, but the last (a verdict) always stays."""
    filled = [(header, [cell(method) for method in section.methods]) for header, cell in columns]
    kept = [item for item in filled if item is filled[-1] or any(text != NOTHING for text in item[1])]
    rows = [
        [label(section, method), *(cells[index] for _, cells in kept)]
        for index, method in enumerate(section.methods)
        if any(cells[index] != NOTHING for _, cells in kept)
    ]
    return table(["method", *(header for header, _ in kept)], rows)


def label(section: Section, method: str) -> str:
    """The method's name, marked where it is the reference or its codes fit the model's stored grid."""
    marks = (" (reference)" if method == section.reference else "") + (f" {ALIGNED}" if section.aligned(method) else "")
    return code(method) + marks


def shown(row: Row | None, write: Callable[[float | None], str]) -> str:
    """A row's value; 'missing' where it was planned and has none."""
    if row is None:
        return NOTHING
    return MISSING if row.value is None else write(row.value)


def quality(section: Section, method: str, text: Text) -> str:
    """Perplexity over the reference's, with the interval where there is one."""
    if method == section.reference:
        return "1" if section.value(method, "perplexity", text) is not None else NOTHING
    row = section.row(method, "perplexity.delta", text)
    if row is not None and row.value is None:
        return MISSING
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
    if not all(math.isfinite(end) for end in row.interval):
        return None, None
    return row.interval


def bits(section: Section, method: str) -> float | None:
    """Bits per weight of a method, scales counted."""
    rows = section.rows(method, (*section.texts, NO_TEXT))
    return next((row.bits_per_weight for row in rows if row.bits_per_weight is not None), None)


def verdict(rows: Sequence[Row], *, by_metric: bool = False) -> str:
    """The most severe verdict, with the metric families (or metrics) it comes from unless all rows share it."""
    worst = severest(rows)
    if worst is None:
        return NOTHING
    found = [row for row in rows if row.verdict is worst]
    names = dict.fromkeys(row.metric.partition(".")[2] or row.metric if by_metric else row.case.family for row in found)
    return str(worst) if len(found) == len(rows) else f"{worst} ({escape(', '.join(names))})"


def footnotes(section: Section, text: Text) -> list[str]:
    """What the marks of the main table mean, and what is known of the model; bullets."""
    lines = []
    if any(section.aligned(method) for method in section.methods):
        lines.append(
            f"- {ALIGNED} Its codes can represent the grid on which this model's weights were stored before: what it "
            "loses here says little about weights that were never quantized."
        )
    if any(quality(section, method, text).endswith(NO_INTERVAL) for method in section.methods):
        lines.append(f"- {NO_INTERVAL} No interval: not paired, fewer than 8 windows, or a value that is not finite.")
    return lines


def memory(section: Section) -> str:
    """The memory family in MiB, and storage as a share of the reference's; "" where none was planned."""
    present = section.metrics(NO_TEXT, "memory")
    if not present:
        return ""
    names = [f"memory.{name}" for name in MEMORY if f"memory.{name}" in present]
    names += [name for name in present if name not in names]
    columns: list[Column] = [
        (name.partition(".")[2].replace("_", " ") + " MiB", _memory_cell(section, name)) for name in names
    ]
    columns.append(("storage / reference", lambda method: number(_share(section, method), 3)))
    columns.append(("verdict", lambda method: verdict(_family(section, method, "memory"), by_metric=True)))
    return by_method(section, columns)


def _memory_cell(section: Section, metric: str) -> Callable[[str], str]:
    return lambda method: shown(section.row(method, metric), mib)


def _share(section: Section, method: str) -> float | None:
    own, reference = (section.value(name, "memory.storage") for name in (method, section.reference))
    return own / reference if own is not None and reference else None


def _family(section: Section, method: str, family: str) -> list[Row]:
    return [row for row in section.rows(method, (NO_TEXT,)) if row.case.family == family]


def latency(section: Section, metric: str, text: Text) -> str:
    """One timed measure: p50, p90, p99 and IQR in ms, runs, ratios with interval (`harness.report.paces`), verdict."""

    def seconds(name: str) -> Callable[[str], str]:
        return lambda method: milliseconds(paces.detail(section.row(method, metric, text), name))

    def within(name: str) -> Callable[[str], str]:
        return lambda method: paces.to_plain(section.row(method, metric, text), section.row(name, metric, text))

    window = any(paces.detail(section.row(method, metric, text), "device_tokens") for method in section.methods)
    columns: list[Column] = [
        ("p50 ms", lambda method: shown(section.row(method, metric, text), milliseconds)),
        ("p90 ms", seconds("p90")),
        ("p99 ms", seconds("p99")),
        ("IQR ms", lambda method: milliseconds(_spread(section.row(method, metric, text)))),
        ("device ms of a window" if window else "device ms", seconds("device_seconds")),
        ("runs", lambda method: _runs(section.row(method, metric, text))),
        (paces.heading(section, metric, text), lambda method: paces.to_reference(section.row(method, metric, text))),
        *((f"ratio to {name} [95%]", within(name)) for name in paces.plains(section, metric, text)),
        ("node", lambda method: _node(section.row(method, metric, text))),
        ("verdict", lambda method: verdict([row] if (row := section.row(method, metric, text)) else [])),
    ]
    return by_method(section, columns)


def _node(row: Row | None) -> str:
    """Where a cluster timed it; of a session on one machine nothing is said."""
    return escape(str(row.detail["node"])) if row is not None and row.detail.get("node") else NOTHING


def _spread(row: Row | None) -> float | None:
    return row.spread if row is not None else None


def _runs(row: Row | None) -> str:
    return str(row.count) if row is not None and row.value is not None else NOTHING


def others(section: Section, text: Text) -> str:
    """Every further metric of a text (or of none), one column a metric with its unit; "" where there is none."""
    names = [
        name
        for name in section.metrics(text)
        if name not in IN_MAIN and name.partition(".")[0] not in ("latency", "memory")
    ]
    if not names:
        return ""
    columns: list[Column] = [(_header(section, name, text), _other_cell(section, name, text)) for name in names]
    if "divergence.kl" in names:  # a mean hides single tokens
        columns += [(f"kl {at} (nat)", _kl_cell(section, at, text)) for at in ("p99", "max")]
    columns.append(
        ("verdict", lambda method: verdict([row for name in names if (row := section.row(method, name, text))]))
    )
    return by_method(section, columns)


def _header(section: Section, metric: str, text: Text) -> str:
    rows = (section.row(method, metric, text) for method in section.methods)
    unit = next((row.unit for row in rows if row is not None and row.unit), "")
    return escape(f"{metric} ({unit})" if unit else metric)


def _other_cell(section: Section, metric: str, text: Text) -> Callable[[str], str]:
    def cell(method: str) -> str:
        row = section.row(method, metric, text)
        low, high = interval(row)
        bounds = "" if low is None else f" [{number(low)}, {number(high)}]"
        return shown(row, number) + bounds

    return cell


def _kl_cell(section: Section, at: str, text: Text) -> Callable[[str], str]:
    return lambda method: number(paces.detail(section.row(method, "divergence.kl", text), at))


def census(section: Section) -> str:
    """Modules and elements quantized and left, and bytes by dtype, of each method; "" where no census was taken."""
    rows = {method: section.rows(method, (*section.texts, NO_TEXT)) for method in section.methods}
    found = {
        method: taken for method in rows if (taken := next((row.census for row in rows[method] if row.census), {}))
    }
    if not found:
        return ""

    def count(name: str) -> Callable[[str], str]:
        return lambda method: _count(found.get(method, {}).get(name))

    columns: list[Column] = [
        ("modules quantized", count("quantized_modules")),
        ("weights quantized", count("quantized_elements")),
        ("parameters left", count("left_elements")),
        ("bits/weight", lambda method: number(bits(section, method) if method in found else None)),
        ("MiB by dtype", lambda method: _by_dtype(found.get(method, {}).get("bytes_by_dtype"))),
    ]
    return by_method(section, columns)


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else NOTHING


def _by_dtype(value: object) -> str:
    if not isinstance(value, dict):
        return NOTHING
    return ", ".join(f"{escape(str(name))} {mib(size)}" for name, size in value.items())
