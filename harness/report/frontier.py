"""Which methods are worth having: the Pareto front of quality, bytes and speed, and what the data cannot tell apart.

Quality is the paired difference of log perplexity to the reference. Two methods are compared on it token by token where
both sides' per-token losses are at hand, else by their intervals; on speed by the intervals of their time over the
reference's; bytes are exact. An axis on which an interval holds 0 (or two intervals overlap) is *not separated*.

A method is **dominated** where another is better on one axis and worse on none, every axis being separated or equal.
It stays **undecided** where that holds only if what is not separated counts as equal. The others are the front.
Intervals are of 95% each, not corrected for the number of pairs: MEANING says so beside the tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from harness.core.errors import HarnessError
from harness.core.files import replace_text
from harness.core.records import Row
from harness.core.stats import paired_delta
from harness.core.text import MIB, NOTHING, exp, mib, milliseconds, ratio
from harness.core.values import digest
from harness.judge.rules import log_ratio
from harness.report.account import Section, Text, complete, sections
from harness.report.markup import code, table
from harness.report.plots import BLUE, GREY, STORAGE_LABEL, VERMILION, canvas_of, label, legend, plain, style, svg_text
from harness.results.directory import Nll, ReportDirectory, nll_reader, read_report

SPEED = "latency.decode"
FEWEST = 2  # methods that can be compared
LONGEST = 150  # characters of what tells plots apart in a file name
KINDS = {  # in which a method can stand, with its colour and its words in a plot
    "front": (BLUE, "front: no other dominates it"),
    "undecided": (VERMILION, "undecided: the data cannot separate it from a better one"),
    "dominated": (GREY, "dominated"),
}
MEANING = """\
Methods stand by quality, the best first; a rank is the range of places that the data allow. *Dominated*: another method
is better in quality, bytes or decode time and worse in none, each of the three separated by the data or equal.
*Undecided*: one would dominate it if what the data cannot separate were equal. *Front*: neither. Quality is compared
pair by pair on the same tokens, so two methods may be told apart though their own intervals overlap. Every interval is
of 95% by itself: among very many pairs some are told apart by chance."""
Span = tuple[float, float]
CENTRE: Span = (0.0, 0.0)


class Relation(IntEnum):
    """How one method stands to another on one axis."""

    BETTER = -1
    EQUAL = 0
    WORSE = 1
    NOT_SEPARATED = 2


@dataclass(frozen=True)
class Point:
    """One method's three figures."""

    method: str
    delta: float  # nat
    interval: Span | None
    bytes: float | None
    seconds: float | None
    slowdown: Span | None  # interval of the log of its time over the reference's
    row: Row | None  # the quality row
    log_time: float | None = None  # of its time over the reference's; pages made before it was kept have none


@dataclass
class Standing:
    """A method's place."""

    point: Point
    dominated_by: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)  # would dominate it if what is not separated were equal
    ranks: tuple[int, int] = (1, 1)  # by quality: the best and worst place that the data allow

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return "dominated" if self.dominated_by else "undecided" if self.undecided else "front"

    @property
    def words(self) -> str:
        """As a table says it."""
        if self.dominated_by:
            return "dominated by " + ", ".join(map(code, self.dominated_by[:2]))
        return "undecided: " + ", ".join(map(code, self.undecided[:2])) if self.undecided else "front"


@dataclass(frozen=True)
class Heading:
    """What the rows of a table have in common."""

    model: str
    device: str
    text: Text
    reference: str
    aligned: frozenset[str]  # methods whose codes can represent the grid of the model's weights

    def marks(self, method: str) -> str:
        """What follows a method's name."""
        return " (reference)" * (method == self.reference) + " †" * (method in self.aligned)

    @property
    def title(self) -> str:
        """Of the plot."""
        return f"{self.model}, {self.device}, {' '.join(self.text)}"


def points(section: Section, text: Text) -> list[Point]:
    """Every method with a quality figure, the reference first."""
    found = []
    decode = section.timed.get(SPEED, SPEED)
    for method in section.methods:
        quality, speed = section.row(method, "perplexity.delta", text), section.row(method, decode)
        storage, seconds = section.value(method, "memory.storage"), section.value(method, decode)
        if method == section.reference:
            own = section.row(method, "perplexity", text)
            found.append(Point(method, 0.0, CENTRE, storage, seconds, None if seconds is None else CENTRE, own))
        elif quality is not None and quality.value is not None and math.isfinite(quality.value):
            time = log_ratio(speed.detail) if speed is not None else None
            slowdown, log_time = (None, None) if time is None else ((time.low, time.high), time.value)
            ends = quality.interval or (-math.inf, math.inf)
            span = ends if all(map(math.isfinite, ends)) else None
            found.append(Point(method, quality.value, span, storage, seconds, slowdown, quality, log_time))
    return found


def apart(ours: Span | None, theirs: Span | None) -> Relation:
    """Two intervals, lower being better."""
    if ours is None or theirs is None:
        return Relation.NOT_SEPARATED
    if ours[1] < theirs[0]:
        return Relation.BETTER
    return Relation.WORSE if theirs[1] < ours[0] else Relation.NOT_SEPARATED


def exactly(ours: float | None, theirs: float | None) -> Relation:
    """Two exact figures, lower being better."""
    if ours is None or theirs is None:
        return Relation.NOT_SEPARATED
    return Relation((ours > theirs) - (ours < theirs))


def quality(ours: Point, theirs: Point, nll: Nll) -> Relation:
    """Token by token where both are at hand, else by intervals."""
    a, b = ours.row, theirs.row
    if a is not None and b is not None and a.nll and b.nll and a.token_hash == b.token_hash:
        if a.nll == b.nll:
            return Relation.EQUAL
        left, right = nll(a.nll), nll(b.nll)
        windows = a.windows or b.windows
        if left is not None and right is not None and windows and len(left) == len(right):
            found = paired_delta(left, right, windows)
            return apart((found.low, found.high) if found.usable else None, CENTRE)
    return apart(ours.interval, theirs.interval)


def standings(found: Sequence[Point], nll: Nll) -> list[Standing]:
    """Every point's place, the best quality first."""
    axes: list[Callable[[Point, Point], Relation]] = [lambda a, b: quality(a, b, nll)]
    if sum(point.bytes is not None for point in found) > 1:
        axes.append(lambda a, b: exactly(a.bytes, b.bytes))
    if sum(point.slowdown is not None for point in found) > 1:
        axes.append(lambda a, b: apart(a.slowdown, b.slowdown))
    places = [Standing(point) for point in sorted(found, key=lambda point: point.delta)]
    for place in places:
        better = worse = 0
        for other in places:
            if other is place:
                continue
            relations = [axis(other.point, place.point) for axis in axes]
            better += relations[0] is Relation.BETTER
            worse += relations[0] is Relation.WORSE
            if Relation.WORSE not in relations and Relation.BETTER in relations:
                sure = Relation.NOT_SEPARATED not in relations
                (place.dominated_by if sure else place.undecided).append(other.point.method)
        place.ranks = (1 + better, len(places) - worse)
    return places


def heading(section: Section, text: Text) -> Heading:
    """What a table's rows have in common."""
    aligned = frozenset(method for method in section.methods if section.aligned(method))
    return Heading(section.model, section.device, (text[0], section.protocol(text)), section.reference, aligned)


def render(head: Heading, places: Sequence[Standing]) -> str:
    """The table of one model, text and device, with who is on the front in words."""
    rows = []
    for place in places:
        point, (best, worst) = place.point, place.ranks
        low, high = point.interval or (None, None)
        span = "" if low is None or high is None or point.interval == CENTRE else f" [{low:+.4f}, {high:+.4f}]"
        rows.append(
            [
                code(point.method) + head.marks(point.method),
                f"{best}" if best == worst else f"{best}–{worst}",
                f"{point.delta:+.4f}{span}",
                mib(point.bytes),
                pace(point, head.reference),
                place.words,
            ]
        )
    headers = ["method", "rank", "Δ ln PPL, nat [95%]", "storage MiB", "decode / reference [95%]", "standing"]
    kept = [index for index in range(len(headers)) if index in (0, 2, 5) or any(row[index] != NOTHING for row in rows)]
    shown = table([headers[index] for index in kept], [[row[index] for index in kept] for row in rows])
    notes = [f"Device {head.device}; text {code(head.text[0])}, protocol {code(head.text[1])}."]
    if all(place.point.slowdown is None for place in places if place.point.method != head.reference):
        notes.append(f"No speeds: `{SPEED}` was not measured, so the front is of quality and bytes.")
    if any(place.point.method in head.aligned for place in places):
        notes.append("† Its codes can represent the grid on which the model's weights were stored before.")
    by_kind = {kind: [code(place.point.method) for place in places if place.kind == kind] for kind in KINDS}
    summary = "\n".join(f"- {kind} ({len(names)}): {', '.join(names)}" for kind, names in by_kind.items() if names)
    return "\n\n".join([f"## {code(head.model)}", " ".join(notes), summary, shown])


def pace(point: Point, reference: str) -> str:
    """A method's time over that of the reference timed in turn with it; the reference's own milliseconds."""
    if point.method == reference:
        return NOTHING if point.seconds is None else f"1 ({milliseconds(point.seconds)} ms)"
    if point.slowdown is None:
        return NOTHING
    low, high = map(exp, point.slowdown)
    return ratio(exp(point.log_time), low, high) if point.log_time is not None else f"[{ratio(low)}, {ratio(high)}]"


def write(folders: Sequence[Path], output: Path) -> str:
    """The tables of every model and text of the sessions, and where each one's plot lies: in `output` or beside it.

    Raises:
        HarnessError: no model has two methods to compare.
    """
    sessions = [read_report(folder) for folder in folders]
    nll = nll_reader(*(session.folder for session in sessions))
    parts = []
    for section in sections(complete([row for session in sessions for row in session.rows], [])):
        for text in section.texts:
            here = points(section, text)
            if len(here) < FEWEST:
                continue
            places, head = standings(here, nll), heading(section, text)
            name = re.sub(r"[^A-Za-z0-9]+", "-", "-".join((section.model, section.device, *text))).strip("-").lower()
            if len(name) > LONGEST:
                name = f"{name[:LONGEST]}-{digest([section.model, section.device, *text])[:8]}"
            home = output.parent if output.is_file() else output
            ReportDirectory(home).claim("-o ")
            path = home / f"frontier-{name}.svg"
            replace_text(path, svg(head.title, places))
            parts.append(f"{render(head, places)}\n\nPlot: {path}\n\n")
    if not parts:
        raise HarnessError("no model has two methods with `perplexity.delta`: measure with --metrics perplexity,memory")
    return "".join(parts) + MEANING


def svg(title: str, places: Sequence[Standing]) -> str:
    """One model's plot, quality over bytes; methods without bytes are left out."""
    with style():
        canvas, (axes,) = canvas_of(5.2, title)
        spots, names, lines = [], [], []
        for place in places:
            point = place.point
            if point.bytes is None:
                continue
            x, y = point.bytes / MIB, point.delta
            low, high = point.interval or CENTRE
            errors = [[max(0.0, y - low)], [max(0.0, high - y)]] if point.interval else None
            colour = KINDS[place.kind][0]
            axes.errorbar(x, y, yerr=errors, fmt="o", ms=6.5, color=colour, ecolor=GREY, lw=1, capsize=2)
            spots.append((x, y))
            names.append(plain(point.method))
            lines.append(((x, low), (x, high)))
        axes.set_xlabel(STORAGE_LABEL)
        axes.set_ylabel("ln perplexity over the reference's, nat (lower is better)")
        axes.margins(x=0.12, y=0.12)
        legend(canvas, [("o", colour, colour, meaning) for colour, meaning in KINDS.values()])
        label(canvas, axes, names, spots, lines)
        return svg_text(canvas, title)
