"""What a line of the main table says of quality, memory and speed: for each a ratio to the reference, and a verdict.

Three verdicts, each from one case, so that a good perplexity does not hide behind a latency that compares with nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from harness.core.records import Row
from harness.core.text import exp, ratio
from harness.report.account import MEMORY, NO_TEXT, QUALITY, SPEED, Section, Text, grouped, kind
from harness.report.decision import Decision, decide
from harness.report.tables import interval, quality_ratio, time_ratio

ASPECTS = (QUALITY, MEMORY, SPEED)


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
