"""Part 2, second half: faults that need an accelerator, on a simulated one, counted apart.

The device is `devices.Cuda` over an object that stands for torch.cuda: kernels are queued on a clock of their
own, memory is counted, and nothing is real but the harness's own code. What a real card would show has not been seen.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from harness import judge
from harness.core import catalog
from harness.core.contracts import Member
from harness.core.environment import Environment
from harness.core.errors import HarnessError
from harness.core.records import Case, Row, Verdict
from harness.judge import bounds
from harness.judge.baselines import Recorded
from harness.metrics import latency, memory
from harness.metrics.measuring import timing
from harness.metrics.measuring.devices import Cuda
from harness.metrics.measuring.timing import Work

MIB = 2**20
WORLD = Environment(device="cuda", torch="2.13.0", sm="sm_90", machine="a" * 16)
LAUNCH_MS, BLOCKS = 0.02, 10
WEIGHTS = {"fp32": 512 * MIB, "nf4": 80 * MIB}
ACTIVATIONS = 200 * MIB
KERNEL_MS = {"fp32": 4.0, "nf4": 6.0}
LAUNCH_BOUND = (LAUNCH_MS / 2,) * 100  # milliseconds of kernels that are quicker than their launches


@dataclass
class Simulated:
    """Stands for torch.cuda: a host clock, a device clock that runs behind it, and an allocator."""

    host_ms: float = 0.0
    device_ms: float = 0.0
    held: int = 0
    highest: int = 0
    pool: int = 0
    waited: bool = True
    repetition: int = field(default=0)

    def launch(self, milliseconds: float) -> None:
        """Queue a kernel: the host goes on after a launch; times vary by some percent, without chance."""
        self.repetition += 1
        self.host_ms += LAUNCH_MS
        jitter = 1 + 0.01 * math.sin(2.3 * self.repetition)
        self.device_ms = max(self.device_ms, self.host_ms) + milliseconds * jitter
        self.waited = False

    def Event(self, *, enable_timing: bool) -> Any:
        """An event of the device's clock, or of the host's for a timer that does not wait."""
        event = types.SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", max(self.device_ms, self.host_ms))
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def synchronize(self) -> None:
        """The host waits for the device."""
        self.host_ms, self.waited = max(self.host_ms, self.device_ms), True

    def allocate(self, count: int) -> None:
        """Tensors made, or with a negative count given back."""
        self.held += count
        self.highest = max(self.highest, self.held)
        self.pool = max(self.pool, self.held)

    def memory_allocated(self) -> int:
        """Bytes of tensors."""
        return self.held

    def max_memory_allocated(self) -> int:
        """The highest mark."""
        return self.highest

    def memory_stats(self) -> dict[str, int]:
        """Statistics by name, as torch's."""
        return {"requested_bytes.all.peak": self.max_memory_allocated()}

    def max_memory_reserved(self) -> int:
        """The pool's size."""
        return self.pool

    def reset_peak_memory_stats(self) -> None:
        """Set the mark to what is held."""
        self.highest = self.held

    def empty_cache(self) -> None:
        """Nothing is given back: each segment of the pool holds a tensor that lives."""


class HostTimed(Cuda):
    """The fault: a timer that reads the host's clock and does not wait for the device."""

    def time(self, *works: Any) -> list[float]:
        """Seconds that launching took."""
        found = []
        for work in works:
            work.prepare()
            start = self._cuda.host_ms
            work.run()
            found.append((self._cuda.host_ms - start) / 1e3)
        return found


class Unwaited(Cuda):
    """The fault: repetitions queue behind each other, and the device is waited for once, behind the last."""

    def time(self, *works: Any) -> list[float]:
        """Seconds between events, launches hidden behind the work before."""
        events = []
        for work in works:
            work.prepare()
            start, end = self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)
            start.record()
            work.run()
            end.record()
            events.append((start, end))
        self._cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


class Unreset(Cuda):
    """The fault: marks are never reset between phases."""

    def reset_peak(self) -> None:
        """Forgets to."""


class Early(Cuda):
    """The fault: the peak of a phase is read before its work ran."""

    def reset_peak(self) -> None:
        """Resets, and reads at once."""
        super().reset_peak()
        self.before = super().peak()

    def peak(self) -> dict[str, int]:
        """What was read too soon."""
        return self.before


class Pooled(Cuda):
    """The fault: the pool's size is taken for that of the tensors in it."""

    def peak(self) -> dict[str, int]:
        """The pool, under the other's name."""
        found = super().peak()
        return {**found, "allocated": found["reserved"]}


def run_peak(kind: type[Cuda], method: str = "nf4", reference_kept: bool = False) -> float:
    """`memory.run_peak` as the metric reads it: after loading with its own peak, one forward; bytes."""
    card = Simulated()
    device = kind(card, types.SimpleNamespace())
    device.torch_device = torch.device("cpu")  # the ids are real, the card is not
    device.reset_peak()
    card.allocate(WEIGHTS["fp32"])  # loading holds the unquantized weights for a while
    card.allocate(WEIGHTS[method] - WEIGHTS["fp32"])
    reference = [WEIGHTS["fp32"]]
    card.allocate(reference[0])

    def release() -> None:
        card.allocate(-0 if reference_kept else -reference.pop())

    def forward(ids: Any, use_cache: bool) -> None:
        card.launch(KERNEL_MS[method])
        card.allocate(ACTIVATIONS)
        card.allocate(-ACTIVATIONS)

    model = types.SimpleNamespace(config=types.SimpleNamespace(max_position_embeddings=512, vocab_size=100))
    called = type("Model", (), {"__call__": lambda self, ids, use_cache: forward(ids, use_cache), **vars(model)})()
    subject: Any = types.SimpleNamespace(model=called, device=device, release_reference=release, before={})
    return memory.METRIC.measure(subject, member("memory.run_peak")).value


def decode(
    kind: type[Cuda], slower: float = 1.0, kernels: Sequence[float] = (KERNEL_MS["nf4"],)
) -> tuple[float, dict[str, Any]]:
    """A latency as the metric has it: p50 seconds of the candidate with such kernels, and its detail."""
    card = Simulated()
    device = kind(card, types.SimpleNamespace())
    streams = [slower * ms for ms in kernels], [KERNEL_MS["fp32"]]
    works = [Work(lambda each=each: [card.launch(ms) for ms in each]) for each in streams]  # type: ignore[misc, func-returns-value]
    found = timing.measure(works[0], works[1], device.time, BLOCKS)
    return sorted(found.candidate)[BLOCKS // 2], latency._against_reference(found)


def member(name: str) -> Member:
    """A metric by its full name."""
    family = catalog.metrics()[name.partition(".")[0]]
    return next(item for item in family.members if item.name == name)


def judged(
    name: str, now: float, then: float, detail: Mapping[str, Any], before: Mapping[str, Any], tests: int = 10
) -> Row:
    """A figure of nf4 held against a record."""
    case, what = Case("m", "nf4", "", "", name, "cuda"), member(name)
    told: Any = {
        "unit": what.unit,
        "count": BLOCKS,
        "method_id": "nf4:linear:batch=1:block=64:dtype=fp16:layers=all:names=*",
    }
    row = Row.of(case, value=now, detail=dict(detail), **told)
    record = Recorded(name, "cuda", then, detail=dict(before), environment=WORLD, file="m/nf4@cuda.yaml", **told)
    rules = bounds.packaged()
    return judge.judge(row, what, bounds=rules, recorded=record, environment=WORLD, nll=lambda sha: None, tests=tests)


def peak_fault(kind: type[Cuda], **more: Any) -> Row:
    """A wrong peak against the right one."""
    return judged("memory.run_peak", run_peak(kind, **more), run_peak(Cuda), {}, {})


def clock_fault(kind: type[Cuda], **more: Any) -> Row:
    """A wrong time against the right one."""
    (now, detail), (then, before) = decode(kind, **more), decode(Cuda, kernels=more.get("kernels", (KERNEL_MS["nf4"],)))
    return judged("latency.decode", now, then, detail, before)


def no_work() -> Row:
    """A model that was never moved to the card."""
    case = Case("m", "nf4", "", "", "latency.decode", "cuda")
    events = types.SimpleNamespace(key_averages=list)
    profile = type("P", (), {"__enter__": lambda self: events, "__exit__": lambda self, *rest: None})
    profiler = types.SimpleNamespace(
        profile=lambda activities: profile(), ProfilerActivity=types.SimpleNamespace(CUDA="CUDA")
    )
    try:
        Cuda(Simulated(), profiler).proof(lambda: None)
    except HarnessError as error:
        return Row.of(case, verdict=Verdict.MISSING, reason=str(error))
    return Row.of(case, value=1.0, verdict=Verdict.SAME)


FAULTS: tuple[tuple[str, Callable[[], Row], Verdict], ...] = (
    ("peak read before the run", lambda: peak_fault(Early), Verdict.BETTER),
    ("peak not reset after loading", lambda: peak_fault(Unreset), Verdict.WORSE),
    ("pool reported in place of tensors", lambda: peak_fault(Pooled), Verdict.WORSE),
    ("reference kept during the run", lambda: peak_fault(Cuda, reference_kept=True), Verdict.WORSE),
    ("timer that does not wait for the device", lambda: clock_fault(HostTimed), Verdict.BETTER),
    ("repetitions queued behind each other", lambda: clock_fault(Unwaited, kernels=LAUNCH_BOUND), Verdict.BETTER),
    ("kernels slower by a quarter", lambda: clock_fault(Cuda, slower=1.25), Verdict.WORSE),
    ("no kernel ran on the device", no_work, Verdict.MISSING),
)


def rounded_otherwise() -> Row:
    """A divergence of nf4, which a card computes in fp16 though nobody wrote so, a little off by rounding."""
    return judged("divergence.kl", 0.0107, 0.01, {}, {})


HARMLESS: tuple[tuple[str, Callable[[], Row], Verdict], ...] = (
    ("fp16's rounding under nf4", rounded_otherwise, Verdict.WITHIN_NOISE),
    ("the same run again", lambda: peak_fault(Cuda), Verdict.SAME),
    ("kernels slower by a hundredth", lambda: clock_fault(Cuda, slower=1.01), Verdict.WITHIN_NOISE),
)
