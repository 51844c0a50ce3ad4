"""Faults in what is timed. The times are shown; what decides is what was run, counted or compared."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from studies.pitfalls.bench import Bench, Shown
from studies.pitfalls.weights import SEED, without_kernel

LENGTH = 128  # tokens of a timed forward
PASSES = 10  # timed, as in report 402d78b58c8735bf
RATE = 0.1  # of dropout


class Events(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operator calls, which stand for a profiler's events."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one and run it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def fed(bench: Bench) -> torch.Tensor:
    """(1, LENGTH) token ids."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, len(bench.tokenizer), (1, LENGTH), generator=generator)


def forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The last logits."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    return logits


def clocked(model: nn.Module, ids: torch.Tensor, passes: int = PASSES) -> float:
    """Milliseconds of a forward, their mean."""
    begin = time.perf_counter()
    for _ in range(passes):
        forward(model, ids)
    return (time.perf_counter() - begin) / passes * 1000


def mean_per_event(bench: Bench) -> Shown:
    """A profiler's average over its events is printed as the time of a pass.

    A forward is hundreds of events. A method that adds small ones lowers the mean, so the slower model prints the
    smaller time. Operator calls stand for a card's kernels here.
    """
    ids = fed(bench)
    found = {}
    for name, model in {"fp32": bench.open(), "int8": without_kernel(bench.open("absmax-int8"))}.items():
        forward(model, ids)
        with Events() as events:
            forward(model, ids)
        found[name] = clocked(model, ids), events.count

    def figures(divide: bool) -> dict[str, float]:
        (ours, calls), (theirs, fewer) = found["int8"], found["fp32"]
        printed = ours / (calls if divide else 1), theirs / (fewer if divide else 1)
        return {
            "time printed, ms": printed[0],
            "wall clock of a pass, ms": ours,
            "times fp32": printed[0] / printed[1],
            "events of a pass": calls,
            "events of a pass in fp32": fewer,
        }

    return Shown(figures(True), figures(False), note="`absmax-int8` without a product that reads codes")


def first_pass(bench: Bench) -> Shown:
    """The reference is timed first, without a pass before it, and pays whatever a first pass pays.

    Kernels are chosen and loaded, memory is taken from the system, caches are cold. The model timed next finds all of
    it done. Here the two models are the same one loaded twice, so anything but 1 is the fault.
    """
    ids = fed(bench)

    def figures(before: int) -> dict[str, float]:
        first, second = bench.open(), bench.open()
        for _ in range(before):
            forward(first, ids)
        times = clocked(first, ids), clocked(second, ids)
        return {"time over that of the same model": times[1] / times[0], "passes before timing": before}

    return Shown(figures(0), figures(2), note=f"means of {PASSES} passes; on a processor a first pass costs little")


def not_synchronized(bench: Bench) -> Shown:
    """The clock stops when a call returns, and on a card a call returns when its work is queued.

    What is measured is the launching. A queue of one thread stands for the card here: what is put into it is done
    later, and the right version waits for it.
    """
    ids, model = fed(bench), bench.open()
    forward(model, ids)
    with ThreadPoolExecutor(1) as card:
        begin = time.perf_counter()
        queued = [card.submit(forward, model, ids) for _ in range(PASSES)]
        launched = (time.perf_counter() - begin) / PASSES * 1000
        for one in queued:
            one.result()
        done = (time.perf_counter() - begin) / PASSES * 1000

    def figures(printed: float) -> dict[str, float]:
        return {"time printed, ms": printed, "wall clock of a pass, ms": done}

    return Shown(figures(launched), figures(done))


def dropout_while_timing(bench: Bench) -> Shown:
    """The model is timed as it was built, in training mode, and set to eval() afterwards.

    Dropout then draws numbers in every layer of every timed pass: work that no inference does, and other results each
    time. Models whose own rate is 0 get the usual 0.1 here.
    """
    ids, model = fed(bench), bench.open()
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = RATE
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = RATE

    def figures(training: bool) -> dict[str, float]:
        model.train(training)
        forward(model, ids)
        first, second = forward(model, ids), forward(model, ids)
        return {
            "largest difference between two passes": float((first - second).abs().max()),
            "time of a pass, ms": clocked(model, ids),
        }

    return Shown(figures(True), figures(False))
