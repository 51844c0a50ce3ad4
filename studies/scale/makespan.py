"""Makespans of a large matrix on many devices, simulated with the costs that a real session measured (costs.json)."""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.core.options import Declared, Options
from harness.core.records import Case
from harness.core.specification import parse, parse_list
from harness.run import plan as planning
from harness.run import shards

COSTS = Path(__file__).with_name("costs.json")
PROTOCOLS = "chunk:512,stride:512:256,gptq:512,rolling:512,half:512,sentence"
DATASETS = "lee,synthetic,wikitext-2,text:notes.txt"
SIZES = (0.135, 0.36, 0.5, 1, 1.7, 3, 3.8, 7, 8, 13)  # billions of parameters of the simulated models, in turn
MODELS = 30
MACHINES = 20  # on which methods cost otherwise than predicted
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def kept() -> dict[str, Any]:
    """What studies/scale/costs.py kept of a session."""
    found: dict[str, Any] = json.loads(COSTS.read_text(encoding="utf-8"))
    return found


def options(models: int, sizes: Sequence[float] = SIZES) -> Options:
    """The whole matrix (every core method, metric and protocol, four texts) over so many models."""
    names = [f"hub:org/model-{number}-{sizes[number % len(sizes)]}B" for number in range(models)]
    return Options(
        declared=Declared(Path()),
        models=tuple(parse(name) for name in names),
        metrics=("all",),
        datasets=parse_list(DATASETS),
        protocols=parse_list(PROTOCOLS),
        device="cpu",
    )


def simulated_cases(sizes: Sequence[float]) -> list[Case]:
    """The main job (perplexity, memory, latency under one protocol) for 30 models of such sizes on four texts."""
    chosen = replace(
        options(MODELS, sizes), metrics=("perplexity", "memory", "latency"), protocols=parse_list("chunk:512")
    )
    return list(planning.plan(chosen, False))


def measured_costs(cases: Sequence[Case]) -> dict[Case, float]:
    """Seconds of each case: those of its method and metric in the kept session, times the ratio of parameters."""
    seconds, unit = kept()["seconds"], shards.billions(kept()["model"])
    return {case: seconds[case.method].get(case.metric, 0.0) * shards.billions(case.model) / unit for case in cases}


def handed_out(seconds: Sequence[float], devices: int) -> float:
    """When the last device is done, if each takes the next group whenever it is free."""
    free = [0.0] * devices
    for one in seconds:
        heapq.heappush(free, heapq.heappop(free) + one)
    return max(free)


def grouped(price: Mapping[Case, float]) -> dict[str, float]:
    """Seconds of each group, in plan order."""
    groups: dict[str, float] = {}
    for case, seconds in price.items():
        groups[case.group] = groups.get(case.group, 0.0) + seconds
    return groups


def bound(groups: Mapping[str, float], devices: int) -> float:
    """What no order ends before: an even share, the longest group, or what some device must take twice of."""
    return max(sum(groups.values()) / devices, *groups.values(), crowded(list(groups.values()), devices))


def crowded(seconds: Sequence[float], devices: int) -> float:
    """Of the k * devices + 1 longest groups some device takes k + 1: no less than the shortest k + 1 of them."""
    falling = sorted(seconds, reverse=True)
    rounds = range(1, (len(falling) - 1) // devices + 1)
    return max((sum(falling[k * devices - k : k * devices + 1]) for k in rounds), default=0.0)


def shard_loads(cases: Sequence[Case], price: Mapping[Case, float], count: int) -> list[float]:
    """Seconds of each static shard; a group that was cut is loaded again in each further piece."""
    loading = {case.group: price[case] for case in cases if case.metric == "memory.parameters"}
    firsts = {case.group: case for case in reversed(cases)}
    loads = []
    for part in shards.partition(cases, count):
        again = {case.group for case in part} - {case.group for case in part if firsts[case.group] == case}
        loads.append(sum(price[case] for case in part) + sum(loading[group] for group in again))
    return loads


def elsewhere(price: Mapping[Case, float], seed: int) -> dict[Case, float]:
    """Costs on a machine where each method takes between half and twice as long as predicted from this one's."""
    generator = random.Random(seed)
    factors = {method: 2 ** generator.uniform(-1, 1) for method in dict.fromkeys(case.method for case in price)}
    return {case: seconds * factors[case.method] for case, seconds in price.items()}


def simulate(sizes: Sequence[float]) -> dict[str, dict[str, float]]:
    """Seconds on so many devices: lower bounds, our order, the plan's, static shards; and ratios on other machines."""
    cases = simulated_cases(sizes)
    price = measured_costs(cases)
    groups, order = grouped(price), shards.longest_first(cases)
    others = [grouped(elsewhere(price, seed)) for seed in range(MACHINES)]
    results = {}
    for count in DEVICES:
        away = [handed_out([one[name] for name in order], count) / bound(one, count) for one in others]
        results[str(count)] = {
            "even": sum(groups.values()) / count,
            "longest": max(groups.values()),
            "crowded": crowded(list(groups.values()), count),
            "ordered": handed_out([groups[name] for name in order], count),
            "plan_order": handed_out(list(groups.values()), count),
            "shards": max(shard_loads(cases, price, count)),
            "elsewhere": max(away),
        }
    return results
