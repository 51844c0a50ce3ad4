"""Which plots a session has, and their drawing as SVG: deterministic, on white, without pyplot's global state.

The report links what `drawn` lists; matplotlib is imported where something is drawn.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.core.records import Case, Row
from harness.core.text import MIB, exp, mib, ratio, visible
from harness.core.values import digest
from harness.report.account import MOST_CASES, NO_TEXT, Section, Text, by_measure, complete, finite, sections
from harness.report.tables import interval, quality_ratio, shown, time_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 60  # plots of one report: a page with more is not read, and drawing them takes longer than writing it
LONGEST = 160  # characters of a file name's stem; file systems allow 255 bytes with the suffix
SIZED = ("memory.storage", "memory.load_peak")
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
STORAGE_LABEL = "storage, MiB (2^20 bytes; lower is better)"
GAP = 7.0  # pixels between a point and its label: half a marker and some air
STEP = 9.0  # pixels by which the search widens: under a line's height, so that no free lane is jumped
RINGS = 18  # the search ends 160 pixels away: further, a leader line no longer tells what it belongs to
MISLEADING = 1.0  # square pixels of overlap that a label nearer to another point than to its own is worth
ANGLES = (0, 180, 90, 270, 45, 135, 315, 225, 20, 160, 340, 200, 70, 110, 250, 290)  # degrees, the readable first


class Panel(NamedTuple):
    """Bars of one metric side by side."""

    metric: str
    read: Callable[[Row], tuple[float, float, float]]  # a row's length of bar with the ends of its whisker
    write: Callable[[float], str]  # that length as text
    title: str


@dataclass(frozen=True)
class Plot:
    """One plot to be drawn: `kind` is 'quality', 'memory' or 'latency'; `text` None for a whole section."""

    kind: str
    section: Section
    text: Text | None
    filename: str
    caption: str


def plots_of(section: Section) -> tuple[Plot, ...]:
    """The plots for which a section has data: quality against memory once a text, the others once."""
    found = []

    def add(kind: str, text: Text | None, caption: str) -> None:
        name = filename("quality-memory" if kind == "quality" else kind, section, text or NO_TEXT)
        read = (text[0], section.protocol(text)) if text else ()
        where = ", ".join((f"{section.model} on {section.device}", *read))
        found.append(Plot(kind, section, text, name, f"{caption}: {where}"))

    for text in section.texts:
        if sum(drawable(section, method, text) for method in section.methods) > 1:  # one point compares with nothing
            add("quality", text, "Loss of quality against memory")
    if sized(section):
        add("memory", None, "Memory by method (lower is better)")
    if timed(section):
        add("latency", None, "Time over the reference's, timed in turn, by method (95%; lower is better)")
    return tuple(found)


def drawn(found: Sequence[Section]) -> tuple[tuple[Plot, ...], ...]:
    """The plots of each section; none at all where there would be more than MOST."""
    wanted = tuple(map(plots_of, found))
    return wanted if sum(map(len, wanted)) <= MOST else tuple(() for _ in wanted)


def drawable(section: Section, method: str, text: Text) -> bool:
    """Whether a method has a place in the plane of storage and loss."""
    ratio = 1.0 if method == section.reference else quality_ratio(section, method, text)
    return finite(ratio) and finite(section.value(method, "memory.storage"))


def sized(section: Section) -> tuple[str, ...]:
    """The sizes worth a panel: what a model needs to run, and what loading it takes."""
    return tuple(name for name in SIZED if any(finite(section.value(method, name)) for method in section.methods))


def timed(section: Section) -> tuple[str, ...]:
    """The two timed measures worth a panel: prefill and decode where they are, else what there is."""
    planned = section.metrics(NO_TEXT, "latency")
    measured = [name for name in planned if any(time_ratio(section.row(method, name)) for method in section.methods)]
    return tuple(by_measure(measured).values())[:2]


def filename(kind: str, section: Section, text: Text) -> str:
    """A file name that two figures never share and that needs no quoting in a link."""
    parts = [part for part in (kind, section.model, section.device, section.reference, *text) if part]
    stem = "--".join(re.sub(r"[^A-Za-z0-9._=+-]", "-", part.replace(":", "+")) for part in parts)
    odd = any(re.search(r"[^A-Za-z0-9._=:-]|--", part) for part in parts)  # something was replaced, or joins may clash
    if odd or len(stem) > LONGEST:
        stem = f"{stem[:LONGEST]}-{digest(parts)[:8]}"
    return f"{stem}.svg"


def svgs(rows: Sequence[Row], planned: Sequence[Case] = ()) -> dict[str, str]:
    """SVG by file name, for every figure that `render` links; the same rows give the same bytes."""
    if len(answered := complete(rows, planned)) > MOST_CASES:
        return {}
    found = {}
    for plot in itertools.chain.from_iterable(drawn(sections(answered))):
        with style():
            canvas = _quality(plot) if plot.kind == "quality" else _bars(plot)
            _freeze(canvas)
            found[plot.filename] = svg_text(canvas, plot.caption)
    return found


def svg_text(canvas: Figure, title: str) -> str:
    """What was drawn as SVG text, without a date."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": visible(title)})
    return buffer.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """Our style over matplotlib's own defaults, whatever the user's matplotlibrc says; put back afterwards."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _freeze(canvas: Figure) -> None:
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


def canvas_of(height: float, title: str, panels: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure of the page's width with its title and panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    FigureCanvasAgg(canvas)
    parts = [title[start : start + NAME_LENGTH] for start in range(0, min(len(title), 110), NAME_LENGTH)]
    canvas.suptitle("".join(map(plain, parts)), fontsize=10.5, fontweight="bold")
    return canvas, list(canvas.subplots(1, panels, squeeze=False, **options)[0])


def _quality(plot: Plot) -> Figure:
    section, text = plot.section, plot.text or NO_TEXT
    names = [method for method in section.methods if drawable(section, method, text)]
    ratios = [1.0 if name == section.reference else quality_ratio(section, name, text) or 1.0 for name in names]
    storage = [(section.value(name, "memory.storage") or 0) / MIB for name in names]
    loss = [100 * (ratio - 1) for ratio in ratios]  # percent
    canvas, (axes,) = canvas_of(5.2, plot.caption)
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
    axes.set_xlabel(STORAGE_LABEL)
    axes.set_ylabel("perplexity above the reference, % (lower is better)")
    axes.margins(x=0.12, y=0.12)
    marks = [
        ("D", DARK, DARK, f"reference ({plain(section.reference)})"),
        ("o", BLUE, BLUE, "no other is both smaller and better"),
        ("o", BLUE, "white", "another is at least as good in both"),
    ]
    legend(canvas, marks)
    label(canvas, axes, [plain(name) for name in names], list(zip(storage, loss, strict=True)), steps)
    return canvas


def legend(canvas: Figure, marks: Sequence[tuple[str, str, str, str]]) -> None:
    """Below the panels: marker, edge, face and meaning of each mark."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], ls="none", marker=marker, mec=edge, mfc=face, ms=6.5, label=meaning)
        for marker, edge, face, meaning in marks
    ]
    canvas.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)


def pareto(sizes: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats in one and equals in the other, by growing size."""
    order = sorted(range(len(sizes)), key=lambda index: (sizes[index], losses[index]))
    front: list[int] = []
    for index in order:
        if not front or losses[index] < losses[front[-1]]:
            front.append(index)
    return front


def label(
    canvas: Figure,
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
        taken.append(Box(min(x0, x1) - 2, min(y0, y1) - 2, max(x0, x1) + 2, max(y0, y1) + 2))
    area = axes.get_window_extent()
    frame = Box(area.x0 + 2, area.y0 + 2, area.x1 - 2, area.y1 - 2)
    boxes = place(pixels, [(extent.width + 4, extent.height + 1) for extent in extents], frame, taken)
    for text, box, (x, y) in zip(texts, boxes, pixels, strict=True):
        x_data, y_data = axes.transData.inverted().transform((box.left + 2, box.bottom))
        text.set_position((float(x_data), float(y_data)))
        edge = (min(max(x, box.left), box.right), min(max(y, box.bottom), box.top))
        if math.dist(edge, (x, y)) > 2 * GAP:
            leader = axes.transData.inverted().transform([(x, y), edge])
            axes.plot(*leader.T, color=GREY, lw=0.6, zorder=1)


def _bars(plot: Plot) -> Figure:
    """Panels of bars side by side, one of bytes or of times each."""
    section = plot.section
    panels: list[Panel] = []
    if plot.kind == "memory":
        for metric in sized(section):
            name = metric.partition(".")[2].replace("_", " ")
            panels.append(Panel(metric, in_mib, mebibytes, f"{name}, MiB (2^20 bytes)"))
    if plot.kind == "latency":
        for metric in timed(section):
            panels.append(Panel(metric, over_reference, ratio, f"{metric.partition('.')[2]} / reference"))
    canvas, drawn = canvas_of(1.3 + BAR_INCHES * len(section.methods), plot.caption, len(panels), sharey=True)
    for axes, panel in zip(drawn, panels, strict=True):
        _panel(axes, section, panel)
    return canvas


def in_mib(row: Row) -> tuple[float, float, float]:
    """Bytes in MiB."""
    value = (row.value if row.value is not None else math.nan) / MIB
    return value, value, value


def mebibytes(value: float) -> str:
    """What `in_mib` gives as text."""
    return mib(value * MIB)


def over_reference(row: Row) -> tuple[float, float, float]:
    """A time over that of the reference which was timed in turn with it; no whisker where its interval is unusable."""
    found = time_ratio(row)
    if found is None:
        return math.nan, math.nan, math.nan
    value, low, high = (exp(end) or math.nan for end in (found.value, found.low, found.high))
    return (value, low, high) if found.usable else (value, value, value)


def _panel(axes: Axes, section: Section, panel: Panel) -> None:
    """One horizontal bar a method with its figure at the end; a word where there is none; an interval as whiskers."""
    axes.set_xlabel(panel.title, fontsize=8.5)
    rows = [section.row(method, panel.metric) for method in section.methods]
    bars = [panel.read(row) if row is not None else (math.nan,) * 3 for row in rows]
    drawn = [value for value, _, _ in bars if math.isfinite(value) and value > 0]
    wide = bool(drawn) and max(drawn) > WIDE_BARS * min(drawn)
    base = min(drawn) / 2 if wide else 0.0  # a logarithmic axis has no zero to start from
    for index, (row, (value, low, high), method) in enumerate(zip(rows, bars, section.methods, strict=True)):
        end = base
        if math.isfinite(value):
            colour = DARK if method == section.reference else BLUE
            axes.barh(index, value - base, left=base, height=0.62, color=colour)
            end = max(value, high)
            if high > low:
                ends = [[max(0.0, value - low)], [max(0.0, high - value)]]
                axes.errorbar(value, index, xerr=ends, fmt="none", ecolor=VERMILION, lw=1.4, capsize=3)
        word = written(row, panel, value)
        axes.annotate(
            word, (end, index), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, bbox=PAPER
        )
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.set_xlabel(f"{panel.title}, logarithmic", fontsize=8.5)
    reference = bars[section.methods.index(section.reference)][0] if section.reference in section.methods else math.nan
    if math.isfinite(reference):
        axes.axvline(reference, color=GREY, ls="--", lw=1, zorder=0.5)
    top = max([*drawn, *(high for _, _, high in bars if math.isfinite(high))], default=1)
    axes.set_xlim(base if wide else 0, top * (top / base) ** 0.4 if wide else top * 1.34)  # room for the figures
    axes.set_yticks(range(len(section.methods)), [plain(method) for method in section.methods])
    axes.set_ylim(len(section.methods) - 0.4, -0.6)  # the reference on top
    axes.grid(axis="y", visible=False)


def written(row: Row | None, panel: Panel, value: float) -> str:
    """The word at a bar's end."""
    return shown(row, lambda _: panel.write(value))


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Shared area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    def distance(self, point: tuple[float, float]) -> float:
        """From a point to the nearest edge, 0 inside."""
        x, y = point
        return math.hypot(max(self.left - x, 0.0, x - self.right), max(self.bottom - y, 0.0, y - self.top))

    @property
    def area(self) -> float:
        """Width times height."""
        return (self.right - self.left) * (self.top - self.bottom)


def place(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], frame: Box, taken: Sequence[Box] = ()
) -> list[Box]:
    """Boxes for labels of the given sizes near their points, all in pixels.

    Greedy: each label takes the nearest position inside `frame` that meets no point, no `taken` box and no label
    before it; where there is none, the position with the least overlap. Crowded points come first, so that those
    with room around them yield.
    """
    occupied = [Box(x - GAP, y - GAP, x + GAP, y + GAP) for x, y in points] + list(taken)
    boxes: dict[int, Box] = {}
    nearest = [
        min((math.dist(point, other) for place, other in enumerate(points) if place != index), default=0.0)
        for index, point in enumerate(points)
    ]
    for index in sorted(range(len(points)), key=nearest.__getitem__):
        best, least = None, math.inf
        for candidate in _positions(points[index], sizes[index]):
            outside = candidate.area - candidate.overlap(frame)
            clash = outside + sum(candidate.overlap(other) for other in occupied)
            own = candidate.distance(points[index]) - 1  # 1 pixel: no visible difference
            clash += MISLEADING * any(candidate.distance(other) < own for other in points)
            if clash < least:
                best, least = candidate, clash
            if clash < 1e-6:  # rounding of pixel coordinates
                break
        assert best is not None
        boxes[index] = best
        occupied.append(best)
    return [boxes[index] for index in range(len(points))]


def _positions(point: tuple[float, float], size: tuple[float, float]) -> Iterator[Box]:
    """Boxes of `size` around a point, nearest first; the box's near edge lies on the ring."""
    (x, y), (width, height) = point, size
    for ring in range(RINGS):
        for angle in ANGLES:
            cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            radius = GAP + 1 + ring * STEP
            centre_x = x + cosine * (radius + width / 2)
            centre_y = y + sine * (radius + height / 2)
            yield Box(centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2)
