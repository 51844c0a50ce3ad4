"""Rows and plan as what tables and plots ask for: one section a model, device and reference."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.core.records import Case, Row, Verdict

Text = tuple[str, str]  # dataset, protocol
NO_TEXT: Text = ("", "")
NEVER = "never reached: the session ended before it"


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
        found: dict[str, list[tuple[Text, Row]]] = {}
        for (method, _, text), row in self.cells.items():
            found.setdefault(method, []).append((text, row))
        return found

    def metrics(self, text: Text, family: str = "") -> tuple[str, ...]:
        """The metrics planned for a text (of one family), in plan order."""
        found = dict.fromkeys(metric for _, metric, where in self.cells if where == text)
        return tuple(metric for metric in found if not family or metric.partition(".")[0] == family)

    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the model, e.g. how its weights were stored."""
        return tuple(dict.fromkeys(str(note) for row in self.cells.values() if (note := row.detail.get("model_note"))))

    def aligned(self, method: str) -> bool:
        """Whether the method's codes can represent the grid on which the model's weights already lie."""
        return method in self._aligned

    @functools.cached_property
    def _aligned(self) -> frozenset[str]:
        return frozenset(
            row.method
            for row in self.cells.values()
            if row.detail.get("grid_aligned") is True or row.census.get("grid_aligned") is True
        )


def finite(value: float | None) -> bool:
    """Whether there is a number to draw."""
    return value is not None and math.isfinite(value)


def complete(rows: Sequence[Row], planned: Sequence[Case]) -> tuple[Row, ...]:
    """One row a case: the planned in plan order (`missing` where no row came), then what no plan holds any more."""
    by_case = {row.case: row for row in rows}  # as `latest`: the last stands, where the first stood
    wanted = dict.fromkeys(planned)
    answered = [by_case.get(case) or Row.of(case, verdict=Verdict.MISSING, reason=NEVER) for case in wanted]
    return (*answered, *(row for case, row in by_case.items() if case not in wanted))


def of_plan(rows: Sequence[Row], planned: Sequence[Case]) -> Sequence[Row]:
    """Of complete rows, those that answer the plan: they come first."""
    return rows[: len(set(planned))]


def sections(rows: Sequence[Row]) -> tuple[Section, ...]:
    """Group complete rows; sections, methods, texts and metrics keep the order of the rows."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.device, row.reference), []).append(row)
    return tuple(_section(key, found) for key, found in groups.items())


def _section(key: tuple[str, str, str], rows: Sequence[Row]) -> Section:
    model, device, reference = key
    cells = {(row.method, row.metric, (row.dataset, row.protocol)): row for row in rows}
    methods = sorted(dict.fromkeys(method for method, _, _ in cells), key=lambda method: method != reference)
    texts = dict.fromkeys(text for _, _, text in cells if text[0])
    return Section(model, device, reference, tuple(methods), tuple(texts), cells)


def severest(rows: Iterable[Row]) -> Verdict | None:
    """The most severe verdict among rows, None without rows."""
    return min((row.verdict for row in rows), key=lambda verdict: verdict.severity, default=None)
