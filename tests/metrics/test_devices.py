"""The CPU for real, CUDA through fakes: a device that runs queued work on a clock of its own."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.core import gpus
from harness.core.errors import HarnessError, UnknownName
from harness.core.gpus import Gpu
from harness.metrics.measuring import devices, timing
from harness.metrics.measuring.devices import Cpu, Cuda, NoDeviceTime, open_device
from harness.metrics.measuring.timing import Work
from harness.run.local import server_environment

MIB = 1 << 20


@dataclass
class FakeCuda:
    """Stands for torch.cuda: events read a device clock in milliseconds, and mean nothing before synchronize."""

    log: list[str] = field(default_factory=list)
    clock_ms: float = 0.0
    held: int = 0
    highest: int = 0
    pool: int = 0
    synchronized: bool = False

    def launch(self, milliseconds: float, name: str = "work") -> None:
        self.log.append(name)
        self.clock_ms += milliseconds
        self.synchronized = False

    def Event(self, *, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)

    def record(self) -> None:
        """An event of a card whose host never runs ahead is reached at once."""

    def synchronize(self) -> None:
        self.log.append("synchronize")
        self.synchronized = True

    def allocate(self, count: int) -> None:
        self.held += count
        self.highest = max(self.highest, self.held)
        self.pool = max(self.pool, self.held)

    def memory_allocated(self) -> int:
        return self.held

    def max_memory_allocated(self) -> int:
        return self.highest

    def memory_stats(self) -> dict[str, int]:
        return {"requested_bytes.all.peak": self.highest - 1}

    def max_memory_reserved(self) -> int:
        return self.pool

    def reset_peak_memory_stats(self) -> None:
        self.log.append("reset")
        self.highest = self.held

    def empty_cache(self) -> None:
        self.log.append("empty")
        self.pool = self.held


@dataclass
class FakeEvent:
    cuda: FakeCuda
    at_ms: float = -1.0

    def record(self) -> None:
        self.cuda.log.append("event")
        self.cuda.record()
        self.at_ms = self.cuda.clock_ms

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.cuda.synchronized, "read before the device was done"
        return end.at_ms - self.at_ms


class FakeProfiler:
    """Stands for torch.profiler; hands out one list of events per profile."""

    ProfilerActivity = SimpleNamespace(CUDA="cuda activity")

    def __init__(self, *profiles: list[SimpleNamespace]) -> None:
        self.profiles = list(profiles)
        self.begun = 0

    def profile(self, *, activities: list[str]) -> Any:
        assert activities == ["cuda activity"]
        self.begun += 1
        return self

    def __enter__(self) -> FakeProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def key_averages(self) -> list[SimpleNamespace]:
        return self.profiles[min(self.begun, len(self.profiles)) - 1]


def event(key: str, microseconds: float, *, on: str = "CUDA", count: int = 1, **more: Any) -> SimpleNamespace:
    device = SimpleNamespace(name=on)
    return SimpleNamespace(key=key, count=count, device_type=device, self_device_time_total=microseconds, **more)


def test_cuda_records_events_around_each_work_and_waits_on_both_sides() -> None:
    cuda = FakeCuda()
    works = [
        Work(lambda: cuda.launch(3.0, "a"), lambda: cuda.launch(50.0, "prepare")),
        Work(lambda: cuda.launch(4.0, "b")),
        Work(lambda: cuda.launch(5.0, "c")),
    ]
    assert Cuda(cuda, FakeProfiler()).time(*works) == pytest.approx([0.003, 0.004, 0.005])  # seconds, prepare left out
    assert cuda.log == [
        *("prepare", "synchronize", "event", "a", "event", "synchronize"),
        *("synchronize", "event", "b", "event", "synchronize"),
        *("synchronize", "event", "c", "event", "synchronize"),
    ]


@dataclass
class Queued(FakeCuda):
    """A card whose host runs ahead: a launch takes the host LAUNCH_MS, and kernels run one behind another."""

    LAUNCH_MS = 0.02
    host_ms: float = 0.0

    def launch(self, milliseconds: float, name: str = "work") -> None:
        self.host_ms += self.LAUNCH_MS
        self.record()
        super().launch(milliseconds, name)

    def record(self) -> None:
        """An event lies in the stream: it is reached when all before it is done, and not before it was given."""
        self.clock_ms = max(self.clock_ms, self.host_ms)

    def synchronize(self) -> None:
        super().synchronize()
        self.host_ms = max(self.host_ms, self.clock_ms)


def test_cuda_times_many_small_kernels_beside_few_long_ones_as_when_alone() -> None:
    def works(cuda: FakeCuda) -> tuple[Work, Work]:
        def launches(count: int, milliseconds: float) -> Work:
            def run() -> None:
                for _ in range(count):
                    cuda.launch(milliseconds)

            return Work(run)

        return launches(600, 0.002), launches(150, 0.1)  # as 4-bit products, launch-bound, and as fp32 ones

    cuda = Queued()
    (alone,) = Cuda(cuda, FakeProfiler()).time(works(cuda)[0])
    assert alone == pytest.approx(600 * Queued.LAUNCH_MS / 1e3, rel=0.01)  # twelve milliseconds of launching
    cuda = Queued()
    timed = timing.measure(*works(cuda), Cuda(cuda, FakeProfiler()).time, blocks=6)
    assert timed.candidate == pytest.approx([alone] * 6)
    assert timed.reference == pytest.approx([0.015] * 6, rel=0.01)


def test_cuda_times_a_plain_callable() -> None:
    cuda = FakeCuda()
    assert Cuda(cuda, FakeProfiler()).time(lambda: cuda.launch(250.0)) == [0.25]


def test_cuda_peak_is_of_the_phase_and_counts_what_was_held() -> None:
    cuda = FakeCuda()
    device = Cuda(cuda, FakeProfiler())
    cuda.allocate(900)
    cuda.allocate(-800)
    assert device.peak() == {"allocated": 900, "requested": 899, "reserved": 900}
    device.reset_peak()
    assert cuda.log[-3:] == ["empty", "synchronize", "reset"]  # the pool first, and no work may still be running
    assert device.peak() == {"allocated": 100, "requested": 99, "reserved": 100}
    cuda.allocate(50)
    assert device.peak() == {"allocated": 150, "requested": 149, "reserved": 150}
    assert device.peak_note == ""


def test_cuda_waits_before_reading_a_peak() -> None:
    cuda = FakeCuda()
    Cuda(cuda, FakeProfiler()).peak()
    assert cuda.log == ["synchronize"]


def test_cuda_release_empties_the_pool() -> None:
    cuda = FakeCuda()
    Cuda(cuda, FakeProfiler()).release()
    assert cuda.log == ["empty"]


def test_device_seconds_count_device_events_alone_and_throw_the_first_profile_away() -> None:
    cuda = FakeCuda()
    warm = [
        event("gemm", 1500.0, count=3),
        event("Memcpy DtoH", 500.0),
        event("aten::mm", 1500.0, on="CPU"),  # the same time once more, on the operator that launched it
        event("my range", 9000.0, is_user_annotation=True),
    ]
    profiler = FakeProfiler([event("gemm", 1e9)], warm)
    assert Cuda(cuda, profiler).device_seconds(lambda: cuda.launch(1.0)) == pytest.approx(0.002)
    assert cuda.log == ["work", "synchronize"] * 2  # the device is done before the profile closes


def test_device_seconds_read_the_old_name_where_the_new_one_is_absent() -> None:
    old = SimpleNamespace(
        key="gemm", count=1, device_type=SimpleNamespace(name="CUDA"), self_cuda_time_total=2_000_000.0
    )
    assert Cuda(FakeCuda(), FakeProfiler([old])).device_seconds(lambda: None) == 2.0


@pytest.mark.parametrize(
    "events", [[], [event("aten::mm", 5.0, on="CPU")], [event("Memcpy HtoD", 5.0)], [event("gemm", 0.0)]]
)
def test_a_profile_without_kernels_is_an_error_and_not_zero_seconds(events: list[SimpleNamespace]) -> None:
    with pytest.raises(NoDeviceTime, match="the profiler saw no CUDA kernel: let this user read performance counters"):
        Cuda(FakeCuda(), FakeProfiler(events)).device_seconds(lambda: None)


def test_proof_needs_kernels_and_bytes() -> None:
    cuda = FakeCuda()
    device = Cuda(cuda, FakeProfiler([event("gemm", 3_000_000.0, count=7), event("Memset", 1_000_000.0)]))
    with pytest.raises(HarnessError, match="no bytes on the CUDA device: the model was not moved there"):
        device.proof(lambda: None)
    cuda.allocate(64)
    assert device.proof(lambda: None) == {"kernel_seconds": 4.0, "kernels": 7, "allocated": 64}


class NoProfiler(FakeProfiler):
    """A torch that was built without CUPTI."""

    def __enter__(self) -> FakeProfiler:
        raise AssertionError("Legacy CUDA profiling requires use_cpu=True")


@pytest.mark.parametrize(
    ("profiler", "why"), [(FakeProfiler([]), "the profiler saw no CUDA kernel"), (NoProfiler(), "cannot profile")]
)
def test_without_a_profiler_bytes_and_the_time_of_events_are_proof_enough(profiler: FakeProfiler, why: str) -> None:
    cuda = FakeCuda(held=64)
    proof = Cuda(cuda, profiler).proof(lambda: cuda.launch(250.0))
    assert why in str(proof.pop("note"))
    assert proof == {"event_seconds": 0.25, "allocated": 64}
    with pytest.raises(HarnessError, match="no time passed on the CUDA device"):
        Cuda(FakeCuda(held=64), profiler).proof(lambda: None)
    with pytest.raises(HarnessError, match="no bytes on the CUDA device"):
        Cuda(FakeCuda(), profiler).proof(lambda: cuda.launch(250.0))


def test_the_fakes_stand_for_what_torch_has() -> None:
    """Every name used on the fakes exists in the installed torch."""
    for name in vars(FakeCuda):
        if not name.startswith("_") and name not in {"launch", "record", "allocate", *FakeCuda.__dataclass_fields__}:
            assert hasattr(torch.cuda, name), name
    assert {"record", "elapsed_time"} <= set(dir(torch.cuda.Event))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(4) + 1
    for entry in profile.key_averages():
        assert entry.device_type.name == "CPU"
        assert isinstance(entry.key, str)
        assert entry.count >= 1
        assert entry.self_device_time_total == 0
        assert entry.is_user_annotation is False


def test_cpu_time_counts_the_run_and_not_the_preparation() -> None:
    fast, slow = Cpu().time(Work(lambda: time.sleep(0.01), lambda: time.sleep(0.4)), Work(lambda: time.sleep(0.05)))
    assert 0.01 <= fast < 0.4
    assert slow >= 0.05


@pytest.mark.parametrize("device", [Cpu(), Cuda(FakeCuda(), FakeProfiler())])
def test_garbage_collection_rests_while_timing_and_comes_back(device: Cpu | Cuda) -> None:
    seen: list[bool] = []

    def fail() -> None:
        raise RuntimeError("boom")

    device.time(lambda: seen.append(gc.isenabled()))
    with pytest.raises(RuntimeError, match="boom"):
        device.time(fail)
    assert seen == [False]
    assert gc.isenabled()


def test_cpu_has_no_device_apart() -> None:
    device = Cpu()
    device.synchronize()
    assert device.name == "cpu"
    assert device.torch_device == torch.device("cpu")
    assert device.device_seconds(lambda: None) is None  # type: ignore[func-returns-value]
    proof = device.proof(lambda: time.sleep(0.01))
    assert proof["wall_seconds"] >= 0.01
    assert proof["resident"] > MIB


def test_cpu_peak_follows_a_phase() -> None:
    device = Cpu()
    device.reset_peak()
    if device.peak_note:
        pytest.skip(f"this kernel's high-water mark is {device.peak_note}")
    before = device.peak()["resident"]
    block = torch.ones(64 * MIB // 4)
    during = device.peak()["resident"]
    assert during - before >= 60 * MIB
    del block
    assert device.peak()["resident"] >= during - MIB  # a peak outlives its cause
    device.reset_peak()
    assert device.peak()["resident"] <= during - 40 * MIB


def fake_proc(folder: Path, *, resident_kb: int, high_kb: int) -> Path:
    (folder / "status").write_text(f"Name:\tx\nVmHWM:\t  {high_kb} kB\nVmRSS:\t  {resident_kb} kB\n")
    return folder


def test_cpu_peak_reads_bytes(tmp_path: Path) -> None:
    device = Cpu(fake_proc(tmp_path, resident_kb=1000, high_kb=1000))
    device.reset_peak()
    assert (tmp_path / "clear_refs").read_text() == "5"
    assert device.peak() == {"resident": 1_024_000}
    assert device.peak_note == ""


def test_cpu_says_when_the_mark_did_not_go_back(tmp_path: Path) -> None:
    device = Cpu(fake_proc(tmp_path, resident_kb=1000, high_kb=9000))
    device.reset_peak()
    assert device.peak_note == "not resettable (no effect): peak of the whole process"


def test_cpu_falls_back_without_proc(tmp_path: Path) -> None:
    device = Cpu(tmp_path / "absent")
    device.reset_peak()
    assert device.peak_note == "not resettable (No such file or directory): peak of the whole process"
    assert device.peak()["resident"] > 100 * MIB  # torch is loaded


def test_open_device() -> None:
    assert open_device("cpu").name == "cpu"
    with pytest.raises(UnknownName, match=r"unknown device 'gpu'.*known: cpu, cuda"):
        open_device("gpu")


class Torch:
    """torch.cuda as a build for some cards, under some driver, answers."""

    def __init__(self, available: bool = False, sm: tuple[int, int] = (9, 0), built: str = "", init: str = "") -> None:
        self.is_available = lambda: available
        self.get_device_capability = lambda: sm
        self.get_arch_list = built.split
        self._init = init

    def init(self) -> None:
        if self._init:
            raise RuntimeError(self._init)


OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"
GPU = Gpu("NVIDIA H100", "sm_90", 0)


@pytest.mark.parametrize(
    ("cards_there", "trouble", "torch_cuda", "built_for", "words"),
    [
        ([], "no NVIDIA driver", Torch(), "12.6", r"^no CUDA device: no NVIDIA driver; run with --device cpu"),
        ([], "", Torch(), None, r"^no CUDA device: the driver shows none, see CUDA_VISIBLE_DEVICES"),
        ([GPU], "", Torch(), None, r"H100 is there, but this torch \(.*\) is a build for the processor alone: install"),
        ([GPU], "", Torch(init=OLD), "12.6", r"H100 is there, .* needs a newer driver for CUDA 12.6: update it, or"),
        (
            [GPU],
            "",
            Torch(init="CUDA unknown error\nmore"),
            "12.6",
            r"cannot start CUDA \(CUDA unknown error more\): see",
        ),
        ([GPU], "", Torch(), "12.6", "finds no device: see nvidia-smi"),
    ],
)
def test_a_card_that_cannot_be_used_says_why(
    monkeypatch: pytest.MonkeyPatch, cards_there: list[Gpu], trouble: str, torch_cuda: Any, built_for: str, words: str
) -> None:
    monkeypatch.setattr(gpus, "cuda_devices", lambda: cards_there)
    monkeypatch.setattr(gpus, "trouble", lambda: trouble)
    why = devices.refusal(torch_cuda, built_for)
    assert re.search(words, why)
    assert "\n" not in why


@pytest.mark.parametrize(
    ("capability", "built", "usable"),
    [
        ((9, 0), "sm_80 sm_90", True),
        ((8, 6), "sm_80 sm_90", True),  # code of the same major version
        ((8, 0), "sm_86 sm_90", False),  # but of no later minor one
        ((7, 0), "sm_75 sm_80", False),
        ((12, 0), "sm_80 sm_90", False),
        ((12, 0), "sm_80 compute_90", True),  # which the driver compiles
        ((8, 0), "sm_75 compute_90", False),
        ((9, 0), "sm_90a", True),
        ((10, 3), "sm_100a", False),  # of that card alone
        ((12, 1), "sm_120", True),
        ((9, 0), "", True),  # a build that does not say
        ((9, 0), "gfx90a", True),
    ],
)
def test_kernels_for_a_card(capability: tuple[int, int], built: str, usable: bool) -> None:
    why = devices.refusal(Torch(True, capability, built), "12.6")
    assert (why == "") is usable
    if why:
        assert f"has no kernels for the card (sm_{capability[0]}{capability[1]}; it has {built})" in why


def test_open_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "refusal", lambda: "no CUDA device: none")
    with pytest.raises(HarnessError, match="no CUDA device: none"):
        open_device("cuda")
    monkeypatch.setattr(devices, "refusal", lambda: "")
    monkeypatch.setattr(devices, "full_precision", lambda: {"tf32": False})
    device = open_device("cuda")
    assert (device.name, device.torch_device) == ("cuda", torch.device("cuda"))
    assert device.precision == {"tf32": False}
    assert Cpu().precision == {}


SWITCHES = """
import torch
from harness.metrics.measuring import devices
before = torch.backends.cuda.matmul.allow_tf32
after = devices.full_precision()
print(before, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, after)
"""


@pytest.mark.parametrize("override", ["0", "1"])
def test_what_the_harness_sets_wins_over_a_container_that_asks_for_tf32(override: str) -> None:
    world = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": override}
    done = subprocess.run([sys.executable, "-c", SWITCHES], capture_output=True, text=True, env=world, check=True)
    set_by = "{'fp32_products': 'highest', 'tf32': False, 'half_sums_in_half': False}"
    assert done.stdout.strip() == f"{override == '1'} False False {set_by}"


def test_every_process_of_a_group_starts_without_tf32() -> None:
    asked = server_environment(1)
    assert (asked["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"], asked["NVIDIA_TF32_OVERRIDE"]) == ("0", "0")
