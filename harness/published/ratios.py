"""Latency ratios measured here, to stand beside published ones: the only part of a time that travels at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.records import Row
from harness.core.specification import parse
from harness.judge import baselines
from harness.judge.recorded import Recorded

EMBEDDED = "smollm2-135m"  # whose recorded figures stand beside published ones where no session is named
INSTEAD: Mapping[str, tuple[str, ...]] = {  # what a report timed -> members of `latency`, the nearest first
    "forward": ("latency.forward", "latency.prefill"),
    "generate": ("latency.generate", "latency.decode"),
    "evaluation": ("latency.evaluation", "latency.forward", "latency.prefill"),
}
SIMILAR = 1.1  # two ratios within 10% are called alike: reports print no intervals


@dataclass(frozen=True)
class Ratio:
    """A method's time over the reference's: geometric centre and 95% limits."""

    value: float
    low: float
    high: float
    metric: str  # member of `latency`
    where: str  # model and device


Measured = Mapping[tuple[str, str], Ratio]  # by method name and member of `latency`


def of_rows(rows: Iterable[Row]) -> Measured:
    """The ratios of a session's rows; of a method's specifications the bare name, else the first, stands for it."""
    found: dict[tuple[str, str], Ratio] = {}
    for row in sorted(rows, key=lambda row: ":" in row.method):
        if row.value is not None and row.metric.startswith("latency."):
            _put(found, row.method, row.metric, row.detail, f"{row.model}, {row.device}")
    return found


def of_baselines(folder: Path) -> Measured:
    """The ratios recorded for the embedded model's bare methods, of several the newest."""
    entries: list[Recorded] = []
    for path in baselines.overlays(folder / EMBEDDED):
        bare = path.name.partition("@")[0]
        entries += [entry for entry in baselines.read_overlay(path)[1] if entry.method_id.partition(":")[0] == bare]
    found: dict[tuple[str, str], Ratio] = {}
    for entry in sorted(entries, key=lambda entry: entry.recorded, reverse=True):
        if entry.metric.startswith("latency."):
            world = entry.environment
            chip = world.gpu or f"{world.cpu} ({world.instructions}), {world.threads} threads"
            where = f"{EMBEDDED}, {chip}, recorded {entry.recorded[:10]}"
            _put(found, entry.method_id, entry.metric, entry.detail, where)
    return found


def _put(found: dict[tuple[str, str], Ratio], method: str, metric: str, detail: Mapping[str, Any], where: str) -> None:
    limits = [detail.get(name) for name in ("log_ratio", "log_ratio_low", "log_ratio_high")]
    if all(isinstance(limit, (int, float)) and math.isfinite(limit) for limit in limits):
        value, low, high = (math.exp(float(limit)) for limit in limits if limit is not None)
        found.setdefault((parse(method).name, metric), Ratio(value, low, high, metric, where))


def beside(entries: Sequence[Mapping[str, Any]], measured: Measured) -> list[dict[str, Any]]:
    """The entries, each published ratio of times with ours beside it and the reason where the two differ."""
    return [{**entry, **_beside(entry, measured)} for entry in entries]


def _beside(entry: Mapping[str, Any], measured: Measured) -> dict[str, Any]:
    published, timed = entry.get("published_ratio"), entry.get("timed", "")
    name = str(entry.get("specification", "")).partition(":")[0]
    ours = next((measured[name, metric] for metric in INSTEAD.get(timed, ()) if (name, metric) in measured), None)
    if published is None or ours is None:
        return {"our_ratio": None}
    kept = {"value": ours.value, "low": ours.low, "high": ours.high, "metric": ours.metric, "where": ours.where}
    return {"our_ratio": kept, "why_ratio": why(entry, published, timed, ours, name)}


def why(entry: Mapping[str, Any], published: float, timed: str, ours: Ratio, name: str) -> str:
    """Whether the ratios are alike, and what is known to separate them."""
    if ours.low <= published <= ours.high or max(published / ours.value, ours.value / published) <= SIMILAR:
        return "alike"
    parts = [_direction(published, ours.value)]
    if entry.get("verdict") == "refuted":
        parts.append("the published times break the hardware's arithmetic, so their ratio says nothing of it")
    parts.append(_kernels(name))
    if entry.get("timing"):
        parts.append(str(entry["timing"]))
    if any(word in str(entry.get("specification")) for word in ("names=", "layers=")):
        parts.append("ours with every projection quantized")
    if ours.metric != f"latency.{timed}":
        parts.append(f"{ours.metric} stands in for the report's {timed}")
    parts.append(f"{entry.get('model')} there, another model here")
    return "; ".join(parts)


def _direction(published: float, ours: float) -> str:
    if (published < 1) != (ours < 1):
        return f"{'faster' if published < 1 else 'slower'} there, {'faster' if ours < 1 else 'slower'} here"
    return f"{'faster' if ours < 1 else 'slower'} in both, {ours / published:.2g} times the published ratio here"


def _kernels(name: str) -> str:
    if name.startswith("bnb-"):
        return "bitsandbytes has kernels for cards that read its codes, and others for processors"
    return "an implementation of its own there, ours here, on hardware that the report does not name"
