"""Draws the plots of a session as SVG: deterministic, on white, without pyplot's global state."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.core.records import Case, Row
from harness.core.text import MIB, NOTHING, exp, mib, milliseconds, perplexity, visible
from harness.report.document import is_large
from harness.report.matrix import NO_TEXT, Section, Text, complete, finite, sections
from harness.report.plots import labels
from harness.report.plots.chosen import Figure, drawable, drawn, sized, timed
from harness.report.tables import interval, quality_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Okabe and Ito's palette (2008), told apart by readers with any colour vision; shapes and labels say the same again
BLUE, VERMILION, DARK, GREY = "#0072B2", "#D55E00", "#222222", "#8A8A8A"
WIDTH_INCHES, DPI = 9.0, 100  # 900 pixels, the width of a page on a code host
BAR_INCHES = 0.34  # height of one bar and its gap: 9-point names without touching
WIDE_LOSS = 30.0  # percent of loss beyond which losses under one percent vanish on a linear axis
WIDE_BARS = 10.0  # largest over smallest beyond which the small bars cannot be told apart on a linear axis
NAME_LENGTH = 30  # characters of a method's name; longer ones are cut in the middle
STYLE = {"font.size": 9, "svg.fonttype": "path", "svg.hashsalt": "harness", "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "axes.grid": True, "grid.color": "#E4E4E4", "axes.axisbelow": True}
STYLE |= {"figure.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": DPI, "font.family": "DejaVu Sans"}


PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # under figures, so that no line strikes them out


def svgs(rows: Sequence[Row], planned: Sequence[Case] = ()) -> dict[str, str]:
    """SVG by file name, for every figure that `render` links; the same rows give the same bytes."""
    if is_large(len(planned)) or is_large(len(answered := complete(rows, planned))):
        return {}
    found = drawn(sections(answered))
    return {figure.filename: svg(figure) for figures in found for figure in figures}


def svg(figure: Figure) -> str:
    """One figure as SVG text."""
    with style():
        buffer = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Title": visible(figure.caption)}
        draw(figure).savefig(buffer, format="svg", metadata=metadata)
        return buffer.getvalue()


def png(figure: Figure) -> bytes:
    """One figure as PNG, for places that show no SVG."""
    with style():
        buffer = io.BytesIO()
        draw(figure).savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """Our style over matplotlib's own defaults, whatever the user's matplotlibrc says; put back afterwards."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def draw(figure: Figure) -> Canvas:
    """The figure as a matplotlib one, laid out."""
    canvas = {"quality": _quality, "memory": _memory, "latency": _latency, "combined": _combined}[figure.kind](figure)
    _freeze(canvas)
    return canvas


def _freeze(canvas: Canvas) -> None:
    """Lay out once and keep it: pixels are known from here on, and saving need not do it again."""
    if canvas.get_layout_engine() is not None:
        canvas.draw_without_rendering()
        canvas.set_layout_engine("none")


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: no math, nothing its font lacks, not too long."""
    text = visible(text)
    if len(text) > NAME_LENGTH:
        half = (NAME_LENGTH - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    return "".join(char if ord(char) < 0x500 or char in "…–†" else "?" for char in text).replace("$", r"\$")


def canvas_of(height: float, title: str, panels: int = 1, **options: Any) -> tuple[Canvas, list[Axes]]:
    """An empty figure of the page's width with its title and panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as MatplotlibFigure

    canvas = MatplotlibFigure(figsize=(WIDTH_INCHES, height), layout="constrained")
    FigureCanvasAgg(canvas)
    canvas.suptitle("".join(plain(part) for part in _pieces(title)), fontsize=10.5, fontweight="bold")
    return canvas, list(canvas.subplots(1, panels, squeeze=False, **options)[0])


def _pieces(title: str) -> list[str]:
    return [title[start : start + NAME_LENGTH] for start in range(0, min(len(title), 110), NAME_LENGTH)]


def _quality(figure: Figure) -> Canvas:
    section, text = figure.section, figure.text or NO_TEXT
    names = [method for method in section.methods if drawable(section, method, text)]
    ratios = [1.0 if name == section.reference else quality_ratio(section, name, text) or 1.0 for name in names]
    storage = [(section.value(name, "memory.storage") or 0) / MIB for name in names]
    loss = [100 * (ratio - 1) for ratio in ratios]  # percent
    canvas, (axes,) = canvas_of(5.2, figure.caption)
    front = pareto(storage, loss)
    axes.step(*zip(*[(storage[i], loss[i]) for i in front], strict=True), where="post", color=GREY, ls="--", lw=1)
    steps = [((storage[i], loss[i]), (storage[j], loss[i])) for i, j in itertools.pairwise(front)]
    steps += [((storage[j], loss[i]), (storage[j], loss[j])) for i, j in itertools.pairwise(front)]
    for index, (name, x, y) in enumerate(zip(names, storage, loss, strict=True)):
        ends = interval(section.row(name, "perplexity.delta", text))
        low, high = (100 * ((exp(end) or 1) - 1) if end is not None else y for end in ends)
        axes.errorbar(x, y, yerr=[[max(0.0, y - low)], [max(0.0, high - y)]], fmt="none", ecolor=GREY, lw=1, capsize=2)
        steps.append(((x, low), (x, high)))
        is_reference = name == section.reference
        colour, marker = (DARK, "D") if is_reference else (BLUE, "o")
        face = colour if is_reference or index in front else "white"
        axes.plot(x, y, ms=6.5, mfc=face, mec=colour, ls="none", marker=marker)
    if max(loss) > WIDE_LOSS:
        axes.set_yscale("symlog", linthresh=1.0, linscale=1.5)  # linear within one percent, where most methods lie
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel("storage, MiB (2^20 bytes; lower is better)")
    axes.set_ylabel("perplexity above the reference, % (lower is better)")
    axes.margins(x=0.12, y=0.12)
    _legend(axes, section)
    label(canvas, axes, [plain(name) for name in names], list(zip(storage, loss, strict=True)), steps)
    return canvas


def _legend(axes: Axes, section: Section) -> None:
    from matplotlib.lines import Line2D

    def mark(marker: str, colour: str, face: str, text: str) -> Line2D:
        return Line2D([], [], ls="none", marker=marker, mec=colour, mfc=face, ms=6.5, label=text)

    handles = [
        mark("D", DARK, DARK, f"reference ({plain(section.reference)})"),
        mark("o", BLUE, BLUE, "no other is both smaller and better"),
        mark("o", BLUE, "white", "another is at least as good in both"),
    ]
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)


def pareto(sizes: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats in one and equals in the other, by growing size."""
    order = sorted(range(len(sizes)), key=lambda index: (sizes[index], losses[index]))
    front: list[int] = []
    for index in order:
        if not front or losses[index] < losses[front[-1]]:
            front.append(index)
    return front


def label(
    canvas: Canvas,
    axes: Axes,
    names: Sequence[str],
    points: Sequence[tuple[float, float]],
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]],
) -> None:
    """Write the names beside their points and clear of the lines, with a leader where a name had to move away."""
    _freeze(canvas)
    axes.set_autoscale_on(False)  # a leader would move the limits that names are placed by
    texts = [axes.text(0, 0, name, fontsize=8.5, color=DARK, va="bottom") for name in names]
    extents = [text.get_window_extent() for text in texts]
    pixels = [tuple(axes.transData.transform(point)) for point in points]
    taken = []
    for ends in lines:
        (x0, y0), (x1, y1) = axes.transData.transform(ends)
        taken.append(labels.Box(min(x0, x1) - 2, min(y0, y1) - 2, max(x0, x1) + 2, max(y0, y1) + 2))
    area = axes.get_window_extent()
    frame = labels.Box(area.x0 + 2, area.y0 + 2, area.x1 - 2, area.y1 - 2)
    boxes = labels.place(pixels, [(extent.width + 4, extent.height + 1) for extent in extents], frame, taken)
    for text, box, (x, y) in zip(texts, boxes, pixels, strict=True):
        x_data, y_data = axes.transData.inverted().transform((box.left + 2, box.bottom))
        text.set_position((float(x_data), float(y_data)))
        edge = (min(max(x, box.left), box.right), min(max(y, box.bottom), box.top))
        if math.dist(edge, (x, y)) > 2 * labels.GAP:
            leader = axes.transData.inverted().transform([(x, y), edge])
            axes.plot(*leader.T, color=GREY, lw=0.6, zorder=1)


def _memory(figure: Figure) -> Canvas:
    section = figure.section
    metrics = sized(section)
    canvas, panels = canvas_of(1.3 + BAR_INCHES * len(section.methods), figure.caption, len(metrics), sharey=True)
    for axes, metric in zip(panels, metrics, strict=True):
        name = metric.partition(".")[2].replace("_", " ")
        _bars(axes, section, metric, NO_TEXT, 1 / MIB, mib, f"{name}, MiB (2^20 bytes)")
    return canvas


def _latency(figure: Figure) -> Canvas:
    section = figure.section
    metrics = timed(section)
    canvas, panels = canvas_of(1.3 + BAR_INCHES * len(section.methods), figure.caption, len(metrics), sharey=True)
    for axes, metric in zip(panels, metrics, strict=True):
        _bars(axes, section, metric, NO_TEXT, 1000, milliseconds, f"{metric.partition('.')[2]}, ms")
    return canvas


def _combined(figure: Figure) -> Canvas:
    section, text = figure.section, figure.text or NO_TEXT
    panels: list[tuple[str, Text, float, Callable[[float | None], str], str]] = [
        ("perplexity", text, 1, perplexity, "perplexity")
    ]
    if any(finite(section.value(method, "memory.storage")) for method in section.methods):
        panels.append(("memory.storage", NO_TEXT, 1 / MIB, mib, "storage, MiB"))
    if metrics := timed(section):
        name = metrics[-1]  # decode where it is: what a reader of generated text waits for
        panels.append((name, NO_TEXT, 1000, milliseconds, f"{name.partition('.')[2]} latency, ms"))
    height = 1.3 + BAR_INCHES * len(section.methods)
    canvas, drawn = canvas_of(height, figure.caption, len(panels), sharey=True)
    for axes, (metric, where, scale, write, title) in zip(drawn, panels, strict=True):
        _bars(axes, section, metric, where, scale, write, title)
    return canvas


def _bars(
    axes: Axes,
    section: Section,
    metric: str,
    text: Text,
    scale: float,
    write: Callable[[float | None], str],
    title: str,
) -> None:
    """One horizontal bar a method with its figure at the end; a word where there is none; quartiles as whiskers."""
    axes.set_xlabel(title, fontsize=8.5)
    rows = [section.row(method, metric, text) for method in section.methods]
    values = [row.value * scale if row is not None and row.value is not None else math.nan for row in rows]
    drawn = [value for value in values if math.isfinite(value) and value > 0]
    wide = bool(drawn) and max(drawn) > WIDE_BARS * min(drawn)
    base = min(drawn) / 2 if wide else 0.0  # a logarithmic axis has no zero to start from
    for index, (row, value, method) in enumerate(zip(rows, values, section.methods, strict=True)):
        end = base
        if math.isfinite(value):
            colour = DARK if method == section.reference else BLUE
            axes.barh(index, value - base, left=base, height=0.62, color=colour)
            low, high = quartiles(row, scale) if row is not None else (value, value)
            end = max(value, high)
            if high > low:
                ends = [[max(0.0, value - low)], [max(0.0, high - value)]]
                axes.errorbar(value, index, xerr=ends, fmt="none", ecolor=VERMILION, lw=1.4, capsize=3)
        word = NOTHING if row is None else "missing" if row.value is None else write(row.value)
        axes.annotate(
            word, (end, index), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, bbox=PAPER
        )
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.set_xlabel(f"{title}, logarithmic", fontsize=8.5)
    reference = section.value(section.reference, metric, text)
    if finite(reference) and reference is not None:
        axes.axvline(reference * scale, color=GREY, ls="--", lw=1, zorder=0.5)
    top = max([*drawn, *(quartiles(row, scale)[1] for row in rows if row is not None and finite(row.value))], default=1)
    axes.set_xlim(base if wide else 0, top * (top / base) ** 0.4 if wide else top * 1.34)  # room for the figures
    axes.set_yticks(range(len(section.methods)), [plain(method) for method in section.methods])
    axes.set_ylim(len(section.methods) - 0.4, -0.6)  # the reference on top
    axes.grid(axis="y", visible=False)


def quartiles(row: Row, scale: float) -> tuple[float, float]:
    """First and third quartile of the samples; without samples the value with half its spread to either side."""
    value = row.value or 0.0
    if row.case.family != "latency":
        return value * scale, value * scale
    samples = sorted(sample for sample in row.samples if math.isfinite(sample))
    if len(samples) > 3:  # fewer have no quartiles
        return tuple(_quantile(samples, share) * scale for share in (0.25, 0.75))  # type: ignore[return-value]
    half = (row.spread or 0.0) / 2 if row.spread is None or math.isfinite(row.spread) else 0.0
    return (value - half) * scale, (value + half) * scale


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics (numpy's default)."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
