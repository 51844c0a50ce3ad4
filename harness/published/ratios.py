"""Latency ratios measured here, to stand beside published ones: the only part of a time that travels at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.errors import BadFile, MissingAsset
from harness.records import Row
from harness.specifications import parse

PREFERRED = ("latency.forward", "latency.prefill")  # the reports time one forward pass


@dataclass(frozen=True)
class Ratio:
    """A method's time over the reference's in one session: geometric centre and 95% limits."""

    value: float
    low: float
    high: float
    where: str  # model, metric and device

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] on {self.where}"


def read_rows(folder: Path) -> tuple[Row, ...]:
    """The measurements of a report directory; one line of error where there are none or they do not read."""
    path = folder / "measurements.jsonl"
    if not path.is_file():
        raise MissingAsset(f"{path} is not there: name a report directory that a session wrote")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(Row.from_json(line))
        except (ValueError, KeyError, TypeError) as error:
            raise BadFile(f"{path}, line {number}: {error}") from error
    return tuple(rows)


def ratios(rows: Iterable[Row]) -> Mapping[str, Ratio]:
    """By method name, from the rows that hold a log ratio; a full forward pass before a prefill."""
    found: dict[str, Ratio] = {}
    timed = [row for row in rows if row.metric in PREFERRED and row.value is not None and "log_ratio" in row.detail]
    for row in sorted(timed, key=lambda row: PREFERRED.index(row.metric)):
        limits = (row.detail[name] for name in ("log_ratio", "log_ratio_low", "log_ratio_high"))
        value, low, high = (math.exp(float(limit)) for limit in limits)
        where = f"{row.model}, {row.metric}, {row.device}"
        found.setdefault(parse(row.method).name, Ratio(value, low, high, where))
    return found
