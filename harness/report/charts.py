"""Plots of the HTML report as numbers: where each dot, interval, tick and name goes. The template draws them as SVG.

A plot is 400 units wide, the width of a phone, so that its letters are as large there as anywhere. Ratios lie on a
logarithmic axis: half and twice the reference are equally far from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.report.plots import Box, place

WIDTH = 400.0
EDGE = 10.0  # free at either side
LANE = 36.0  # height of a method: its name and figure, its dot below
FOOT = 26.0  # height of the tick labels
HEIGHT, LEFT = 270.0, 48.0  # of a plane, and where its left axis stands
LETTER, LINE = 6.4, 13.0  # width of a letter of a plane's names, and their height
NAMED = 24  # dots of a plane up to which each has its name beside it; more overlap, and a hover still tells
TICKS = 5


@dataclass(frozen=True)
class Dot:
    """What is drawn of one method: `value` is a ratio to the reference, with its interval where there is one."""

    name: str
    value: float
    low: float | None
    high: float | None
    figure: str  # value and interval as the table writes them
    told: str  # what a hover says
    link: str
    kind: str  # 'reference', or how its verdict reads: 'bad', 'open', 'good'
    across: float = 0.0  # MiB, in a plane


@dataclass(frozen=True)
class Mark:
    """A dot in its place, in units of the drawing."""

    dot: Dot
    x: float
    y: float
    ends: tuple[float, float] | None  # of its interval, along the axis of ratios
    name_at: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """As it is drawn."""
        return short(self.dot.name)


@dataclass(frozen=True)
class Chart:
    """One plot: `plane` is loss against storage, else one lane a method."""

    title: str
    plane: bool
    height: float
    marks: tuple[Mark, ...]
    ticks: tuple[tuple[float, str], ...]  # of the axis of ratios
    across: tuple[tuple[float, str], ...]  # of a plane's storage
    one: float  # where the reference is, on the axis of ratios


class Axis:
    """A stretch of ratios (logarithmic) or of MiB (linear) on a stretch of the drawing."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool) -> None:
        low, high = min(values), max(values)
        if log:
            room = max(0.06 * math.log(high / low), 0.002)
            low, high = low * math.exp(-room), high * math.exp(room)
        else:
            room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
            low, high = low - room, high + room
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def at(self, value: float) -> float:
        """Where a value lies."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Round numbers on it, with their places."""
        if self.log and self.high / self.low > 4:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            every = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
            found = [value for value in every if self.low <= value <= self.high]
            if len(found) > TICKS:
                found = [value for value in found if f"{value:e}".startswith("1")] or found
                found = found[:: math.ceil(len(found) / TICKS)]
        else:
            least = (self.high - self.low) / TICKS
            unit = 10.0 ** math.floor(math.log10(least))
            step = next(unit * digit for digit in (1, 2, 5, 10) if unit * digit >= least)
            first = math.ceil(self.low / step)
            found = [round(place * step, 12) for place in range(first, math.floor(self.high / step) + 1)]
        return tuple((self.at(value), f"{value:,.6g}") for value in found)


DRAWN = 1e-100, 1e100  # ratios beyond have no place on an axis of doubles


def drawable(dots: Sequence[Dot]) -> list[Dot]:
    """Those with a place on a logarithmic axis."""
    return [dot for dot in dots if DRAWN[0] < dot.value < DRAWN[1]]


def _ends(dot: Dot) -> list[float]:
    """The interval of a dot as far as it can be drawn."""
    ends = (dot.low, dot.high)
    return [end for end in ends if end is not None and DRAWN[0] < end < DRAWN[1]]


def _interval(dot: Dot, axis: Axis) -> tuple[float, float] | None:
    ends = _ends(dot)
    return (axis.at(ends[0]), axis.at(ends[1])) if len(ends) == 2 else None


def lanes(title: str, dots: Sequence[Dot]) -> Chart | None:
    """Ratios to the reference one below the other, each with its interval; None where there is nothing to compare."""
    shown = drawable(dots)
    if len(shown) < 2:
        return None
    values = [1.0, *(value for dot in shown for value in (dot.value, *_ends(dot)))]
    axis = Axis(values, EDGE, WIDTH - EDGE, log=True)
    marks = [Mark(dot, axis.at(dot.value), LANE * place + 27, _interval(dot, axis)) for place, dot in enumerate(shown)]
    return Chart(title, False, LANE * len(shown) + FOOT, tuple(marks), axis.ticks(), (), axis.at(1.0))


def plane(title: str, dots: Sequence[Dot]) -> Chart | None:
    """Loss of quality against storage; None where fewer than two methods have both."""
    shown = [dot for dot in drawable(dots) if math.isfinite(dot.across)]
    if len(shown) < 2:
        return None
    values = [1.0, *(value for dot in shown for value in (dot.value, *_ends(dot)))]
    up = Axis(values, HEIGHT - FOOT, EDGE, log=True)
    right = Axis([dot.across for dot in shown], LEFT, WIDTH - EDGE, log=False)
    spots = [(right.at(dot.across), up.at(dot.value)) for dot in shown]
    names: list[tuple[float, float] | None] = [None] * len(shown)
    if len(shown) <= NAMED:
        frame = Box(LEFT + 2, EDGE, WIDTH, HEIGHT - FOOT - 2)
        sizes = [(LETTER * len(short(dot.name)) + 4, LINE) for dot in shown]
        bars = [
            Box(x - 2, min(ends), x + 2, max(ends))
            for dot, (x, _) in zip(shown, spots, strict=True)
            if (ends := _interval(dot, up))
        ]
        names = [(round(box.left + 2, 1), round(box.top - 3, 1)) for box in place(spots, sizes, frame, bars)]
    marks = [Mark(dot, x, y, _interval(dot, up), name) for dot, (x, y), name in zip(shown, spots, names, strict=True)]
    return Chart(title, True, HEIGHT, tuple(marks), up.ticks(), right.ticks(), up.at(1.0))


def short(name: str) -> str:
    """A name that fits beside its figure; cut in the middle, since methods differ at both ends."""
    return name if len(name) <= 28 else f"{name[:14]}…{name[-13:]}"
