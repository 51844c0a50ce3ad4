"""The one place with CUDA-specific code: a clock, a memory peak, a proof of work, alike for CPU and CUDA.

`Cuda` reaches the driver only through the two objects it is given (`torch.cuda` and `torch.profiler` by
default), so its logic is tested through fakes on a machine without a card. Before a card computes anything, the
process that will compute asks whether this torch can use it, and sets the precision of its products.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.core import gpus, progress
from harness.core.errors import HarnessError, UnknownName
from harness.metrics.measuring.timing import Work

PROC = Path("/proc/self")
NAMES = ("cpu", "cuda")
RESET_HIGH_WATER = "5"  # proc(5), clear_refs: sets VmHWM back to what is resident now
REPETITION = "a timed repetition"  # what is being done, as it is told
COPIES = ("Memcpy", "Memset")  # the profiler's names of device events that are no kernel


class NoDeviceTime(HarnessError):
    """The profiler cannot look at the device, or saw no kernel, which it reports as zero seconds and no error."""


def open_device(name: str) -> Cpu | Cuda:
    """The device of that name; UnknownName, or HarnessError where no CUDA device can be used.

    A card is opened at full precision (`full_precision`), whatever the environment says.
    """
    if name == "cpu":
        return Cpu()
    if name != "cuda":
        raise UnknownName("device", name, NAMES)
    if why := refusal():
        raise HarnessError(why)
    device = Cuda()
    device.precision = full_precision()
    return device


class Cpu:
    """The host: wall time, and the resident set of this process. Seconds are floats, memory is bytes.

    `peak_note` says what is wrong with `peak` here, '' where nothing is; `precision` the switches that the harness has
    set, for the row. `Cuda` answers alike.
    """

    name = "cpu"

    def __init__(self, proc: Path = PROC) -> None:
        self.torch_device = torch.device("cpu")
        self.peak_note = ""
        self.precision: Mapping[str, Any] = {}
        self._proc = proc

    def synchronize(self) -> None:
        """Nothing to wait for: CPU operations are done when they return."""

    def time(self, *works: Work | Callable[[], object]) -> list[float]:
        """Wall seconds of each, by `perf_counter_ns`, the garbage collector off; `Work.prepare` is not counted."""
        seconds = []
        with _no_collection(), progress.timing():
            for at, work in enumerate(map(_as_work, works), 1):
                progress.between(REPETITION, at, len(works))
                work.prepare()
                start = time.perf_counter_ns()
                work.run()
                seconds.append((time.perf_counter_ns() - start) / 1e9)
        return seconds

    def device_seconds(self, work: Callable[[], object]) -> None:
        """None: no device apart from the host."""

    def reset_peak(self) -> None:
        """Set the kernel's high-water mark of the resident set to what is resident now, after `release`.

        Where /proc/self/clear_refs cannot be written, or is written without effect, `peak_note` says so and
        `peak` is that of the whole process.
        """
        self.release()
        self.peak_note = ""
        try:
            (self._proc / "clear_refs").write_text(RESET_HIGH_WATER, encoding="ascii")
            resident, high = self._status("VmRSS"), self._status("VmHWM")
        except OSError as error:
            self.peak_note = f"not resettable ({error.strerror}): peak of the whole process"
            return
        if high > resident + (1 << 20):  # 1 MiB: threads may touch memory between the two readings
            self.peak_note = "not resettable (no effect): peak of the whole process"

    def peak(self) -> dict[str, int]:
        """{"resident": bytes}: VmHWM since `reset_peak`, else `ru_maxrss`, which counts from the process's start."""
        try:
            return {"resident": self._status("VmHWM")}
        except OSError:
            import resource  # local: not every system has it, and this alone needs it

            unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
            return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}

    def release(self) -> None:
        """Collect garbage and hand free heap pages back to the kernel, where the C library can (glibc)."""
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def proof(self, work: Callable[[], object]) -> dict[str, float | int]:
        """{"wall_seconds", "resident"}: the host always does its own work."""
        (seconds,) = self.time(work)
        return {"wall_seconds": seconds, "resident": self._status("VmRSS")}

    def _status(self, field: str) -> int:
        """Bytes of one line of /proc/self/status, 'VmHWM:   1234 kB'."""
        for line in (self._proc / "status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise OSError(0, f"no {field} in {self._proc / 'status'}")


class Cuda:
    """The current CUDA device, which the caller's CUDA_VISIBLE_DEVICES has chosen."""

    name = "cuda"
    peak_note = ""  # the allocator's marks can always be reset

    def __init__(self, cuda: Any = torch.cuda, profiler: Any = torch.profiler) -> None:
        self.torch_device = torch.device("cuda")
        self.precision: Mapping[str, Any] = {}
        self._cuda = cuda
        self._profiler = profiler

    def synchronize(self) -> None:
        """Wait for every stream of the device."""
        self._cuda.synchronize()

    def time(self, *works: Work | Callable[[], object]) -> list[float]:
        """Seconds between two events on the current stream around each work, which begins on an idle device.

        The host waits for the device before and after each work. Without that, kernels queue behind the work before,
        and a work of many small kernels hides the launches that it waits for by itself. Gaps in which the device waits
        for the host to launch are part of the time; see `device_seconds` for the rest.
        """
        with _no_collection(), progress.timing():
            return [self._timed(_as_work(work), at, len(works)) for at, work in enumerate(works, 1)]

    def _timed(self, work: Work, at: int, of: int) -> float:
        progress.between(REPETITION, at, of)
        start, end = self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)
        work.prepare()
        self._cuda.synchronize()
        start.record()
        work.run()
        end.record()
        self._cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3  # events count milliseconds

    def device_seconds(self, work: Callable[[], object]) -> float:
        """Seconds of kernels and copies under the profiler, summed over streams; NoDeviceTime without a kernel."""
        seconds, _ = self._profiled(work)
        return seconds

    def reset_peak(self) -> None:
        """Release, wait, and set the allocator's marks to what is held now."""
        self.release()
        self._cuda.synchronize()
        self._cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, int]:
        """{"allocated": bytes of tensors, "requested": the same before the pool rounds, "reserved": the pool's}.

        Each is its own highest.
        What was held at `reset_peak` is not subtracted. Contexts, cuBLAS workspaces and a library's own cudaMalloc
        lie outside torch's allocator and are not seen.
        """
        self._cuda.synchronize()
        return {
            "allocated": int(self._cuda.max_memory_allocated()),
            "requested": int(self._cuda.memory_stats().get("requested_bytes.all.peak", 0)),
            "reserved": int(self._cuda.max_memory_reserved()),
        }

    def release(self) -> None:
        """Collect garbage and empty torch's pool."""
        gc.collect()
        self._cuda.empty_cache()

    def proof(self, work: Callable[[], object]) -> dict[str, float | int | str]:
        """{"kernel_seconds", "kernels", "allocated"}: kernels that ran, and bytes of tensors on the device.

        Where the profiler sees no kernel: {"event_seconds", "allocated", "note"}, the time between two events on the
        device's stream and why there is no more. HarnessError where no tensor lies on the device or no time passed.
        """
        evidence: dict[str, float | int | str]
        try:
            seconds, kernels = self._profiled(work)
            evidence = {"kernel_seconds": seconds, "kernels": kernels}
        except NoDeviceTime as error:
            (seconds,) = self.time(work)
            evidence = {"event_seconds": seconds, "note": str(error)}
        allocated = int(self._cuda.memory_allocated())
        if allocated <= 0:
            raise HarnessError("no bytes on the CUDA device: the model was not moved there (use --device cuda)")
        if seconds <= 0:
            raise HarnessError("no time passed on the CUDA device: nothing was run there (use --device cuda)")
        return {**evidence, "allocated": allocated}

    def _profiled(self, work: Callable[[], object]) -> tuple[float, int]:
        """Device seconds and number of kernels of one run. The first profile pays for starting CUPTI: thrown away."""
        for _ in range(2):
            with contextlib.ExitStack() as stack:
                try:
                    activities = [self._profiler.ProfilerActivity.CUDA]
                    profile = stack.enter_context(self._profiler.profile(activities=activities))
                except AssertionError as error:  # torch's word where it was built without CUPTI
                    raise NoDeviceTime(
                        f"this torch cannot profile a CUDA device ({error}): take its own wheel"
                    ) from error
                work()
                self._cuda.synchronize()
        events = [event for event in profile.key_averages() if _on_device(event)]
        kernels = [event for event in events if not event.key.startswith(COPIES)]
        if sum(map(_microseconds, kernels)) <= 0:
            raise NoDeviceTime(
                "the profiler saw no CUDA kernel: let this user read performance counters (CUPTI), "
                "and run nothing else that profiles"
            )
        return sum(map(_microseconds, events)) / 1e6, sum(event.count for event in kernels)


def _on_device(event: Any) -> bool:
    """Whether a profiler event ran on the accelerator; a host event repeats the time of what it launched."""
    return event.device_type.name != "CPU" and not getattr(event, "is_user_annotation", False)


def _microseconds(event: Any) -> float:
    """An event's own device time; torch before its rename of 2024 has only the old name, and newer ones warn at it."""
    value = getattr(event, "self_device_time_total", None)
    return float(event.self_cuda_time_total if value is None else value)


def _as_work(work: Work | Callable[[], object]) -> Work:
    return work if isinstance(work, Work) else Work(work)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out of the timed region: with torch loaded, a full pass takes tenths of a second."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


CUDA_BUILD = "install a CUDA build of torch (pytorch.org/get-started), or run with --device cpu"


def refusal(cuda: Any = torch.cuda, built_for: str | None = torch.version.cuda) -> str:
    """Why the first visible card cannot be used and what to do, in one line; '' where it can.

    Args:
        cuda: stands in for torch.cuda (tests).
        built_for: CUDA version of this torch, '12.6'; None for a build without CUDA.

    Raises:
        HarnessError: a driver that starts and then answers with an error.
    """
    if cuda.is_available():
        return _kernels(tuple(cuda.get_device_capability()), cuda.get_arch_list())
    cards = gpus.cuda_devices()
    if not cards:
        why = gpus.trouble() or "the driver shows none, see CUDA_VISIBLE_DEVICES"
        return f"no CUDA device: {why}; run with --device cpu, or mend that"
    card = f"{cards[0].name} is there, but this torch ({torch.__version__})"
    if built_for is None:
        return f"{card} is a build for the processor alone: {CUDA_BUILD}"
    try:
        cuda.init()
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())
        if "driver" in said and "too old" in said:
            fix = "update it, or install a torch built for an older CUDA"
            return f"{card} needs a newer driver for CUDA {built_for}: {fix}"
        return f"{card} cannot start CUDA ({said[:300]}): see nvidia-smi, or run with --device cpu"
    return f"{card} finds no device: see nvidia-smi, or run with --device cpu"


def _kernels(capability: tuple[int, ...], built: Sequence[str]) -> str:
    """What to do where torch holds no kernels for a card: neither its own code, nor PTX that the driver can compile.

    Code of sm_XY runs on cards of the same X and of Y or more, that of sm_XYa on that card alone; PTX of compute_XY
    on every card from there on.
    """
    for name in built:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)
        if not match:
            return ""  # a list that is not understood refuses nobody
        kind, there = match[1], (int(match[2]), int(match[3]))
        later = there <= capability and (kind == "compute" or there[0] == capability[0])
        if there == capability or (later and not match[4]):
            return ""
    if not built:
        return ""
    card = "sm_" + "".join(map(str, capability))
    return (
        f"this torch ({torch.__version__}) has no kernels for the card ({card}; it has {' '.join(built)}): install one "
        "that has (pytorch.org/get-started), or run with --device cpu"
    )


def full_precision() -> dict[str, Any]:
    """Have fp32 products computed as such and sums of half products kept in fp32, and return what torch says of both.

    TF32 rounds the factors of an fp32 product to 11 bits, and containers turn it on through the environment, which
    torch reads when it is imported; what is set here wins. Half products would be summed in half precision where cuBLAS
    splits them, which depends on shape and card.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    product = torch.backends.cuda.matmul
    product.allow_fp16_reduced_precision_reduction = False
    product.allow_bf16_reduced_precision_reduction = False
    return {
        "fp32_products": torch.get_float32_matmul_precision(),
        "tf32": bool(product.allow_tf32 or torch.backends.cudnn.allow_tf32),
        "half_sums_in_half": bool(
            product.allow_fp16_reduced_precision_reduction or product.allow_bf16_reduced_precision_reduction
        ),
    }
