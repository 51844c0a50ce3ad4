"""Static shards: a plan cut into N parts of about equal predicted cost, alike on every machine. No torch.

A model under a method (a group: loaded and quantized once) stays in one shard, unless it alone is more than a shard's
fair share; then its cases are cut in plan order, and each part loads the model again. Parts go, dearest first, to
the shard that has least so far (longest processing time first, Graham 1969: within 4/3 of the best makespan).

Costs rest on names alone, never on what one machine has on its disk: every machine must cut the same plan alike.
"""

from __future__ import annotations

import functools
import heapq
import re
from collections.abc import Callable, Sequence

from harness.core.records import Case
from harness.core.values import digest

# seconds of a case on two cores with the embedded model, 4,096 tokens, 10 repetitions: only their ratios matter
SECONDS = {
    "memory": 2.0,
    "perplexity": 8.0,
    "divergence": 16.0,
    "latency.prefill": 6.5,
    "latency.decode": 2.5,
    "latency": 30.0,
    "invariant": 1.0,
}
DERIVED = 0.01  # of a family's cost: what a further member costs once the first has run the model
SHARED_FAMILIES = frozenset({"memory", "perplexity", "divergence"})  # one pass answers all members of a text
LOADING_SECONDS = 4.0  # of a group: start, load, quantize
# seconds of a group over those of fp32, as studies/scale/costs.json has them of the embedded model; others: the median
METHODS = {
    "fp32": 1.0,
    "bf16": 0.8,
    "fp16": 1.05,
    "absmax-int8": 1.1,
    "absmax-int8-tensor": 1.25,
    "zeropoint-int8": 1.55,
    "linear-int4": 1.85,
    "linear-int4-affine": 1.7,
    "nf4": 1.35,
    "fp4": 1.3,
    "bnb-int8": 1.55,
    "bnb-fp4": 1.4,
    "bnb-nf4": 1.35,
    "bnb-nf4-dq": 1.4,
}
OTHER_METHOD = 1.35
# billions of parameters where the name does not say them
BILLIONS = {"gpt2": 0.124, "phi-3-mini": 3.82, "smollm2-135m": 0.135, "tiny-gpt2": 0.001, "tiny-olmo": 0.001}
UNKNOWN_BILLIONS = 1.0
SIZE = re.compile(r"(?<![a-z0-9])(\d+(?:\.\d+)?)\s?([bm])(?![a-z])", re.IGNORECASE)


@functools.cache
def billions(model: str) -> float:
    """Parameters of a model in billions, by its name: 'hub:org/Name-8B' -> 8; UNKNOWN_BILLIONS where it is silent."""
    sizes = SIZE.findall(model)
    if model in BILLIONS or not sizes:
        return BILLIONS.get(model, UNKNOWN_BILLIONS)
    number, unit = sizes[-1]
    return float(number) / (1.0 if unit in "bB" else 1000.0)


def costs(cases: Sequence[Case], weigh: Callable[[Case], float] = lambda case: 1.0) -> list[float]:
    """Predicted seconds of each case, in plan order; a group's loading is on its first case.

    `weigh` says how much longer a case is than one of SECONDS, its loading aside.
    """
    loaded: set[str] = set()
    answered: set[tuple[str, ...]] = set()
    prices = []
    for case in cases:
        seconds = SECONDS.get(case.metric.partition(":")[0]) or SECONDS.get(case.family) or SECONDS["perplexity"]
        seconds *= weigh(case)
        if case.family in SHARED_FAMILIES:
            run = (case.group, case.family, case.dataset, case.protocol)
            seconds *= DERIVED if run in answered else 1.0
            answered.add(run)
        if case.group not in loaded:
            loaded.add(case.group)
            seconds += LOADING_SECONDS
        size = billions(case.model) / BILLIONS["smollm2-135m"]
        prices.append(seconds * size * METHODS.get(case.method.partition(":")[0], OTHER_METHOD))
    return prices


def partition(cases: Sequence[Case], count: int) -> list[list[Case]]:
    """`count` lists that hold every case exactly once, each in plan order; the same wherever it is computed."""
    priced = list(zip(costs(cases), range(len(cases)), strict=True))  # (seconds, place in the plan)
    groups: dict[str, list[tuple[float, int]]] = {}
    for price, place in priced:
        groups.setdefault(cases[place].group, []).append((price, place))
    share = sum(price for price, _ in priced) / count
    parts = [part for group in groups.values() for part in cut(group, share)]
    parts.sort(key=lambda part: (-sum(price for price, _ in part), part[0][1]))
    loads = [(0.0, index) for index in range(count)]
    shards: list[list[int]] = [[] for _ in range(count)]
    for part in parts:
        load, index = heapq.heappop(loads)
        shards[index] += [place for _, place in part]
        heapq.heappush(loads, (load + sum(price for price, _ in part), index))
    return [[cases[place] for place in sorted(places)] for places in shards]


def longest_first(cases: Sequence[Case]) -> list[str]:
    """The groups in the order in which to hand them to whoever is free: dearest first by predicted cost.

    Whoever hands out so is done within total / devices + the dearest group (Graham 1966). A model's reference goes
    before its other methods, which wait for its losses.
    """
    price: dict[str, float] = {}
    dearest: dict[tuple[str, str], float] = {}
    for case, seconds in zip(cases, costs(cases), strict=True):
        price[case.group] = price.get(case.group, 0.0) + seconds
        place = (case.model, case.device)
        dearest[place] = max(dearest.get(place, 0.0), price[case.group])
    price |= {case.group: dearest[case.model, case.device] for case in cases if case.method == case.reference}
    first = {case.group: case.method != case.reference for case in cases}
    return sorted(price, key=lambda group: (-price[group], first[group]))


def cut(group: Sequence[tuple[float, int]], share: float) -> list[list[tuple[float, int]]]:
    """A group's priced cases in parts of at most `share` seconds (one case may be dearer), in order."""
    parts: list[list[tuple[float, int]]] = [[]]
    filled = 0.0
    for price, place in group:
        if parts[-1] and filled + price > share:
            parts.append([])
            filled = 0.0
        parts[-1].append((price, place))
        filled += price
    return parts


def plan_digest(cases: Sequence[Case]) -> str:
    """Names a plan: shards of different plans must not be merged."""
    return digest([case.id + "|" + case.reference for case in cases])
