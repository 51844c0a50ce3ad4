"""The device look through a library that answers as the driver would; worker pinning by hand."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import uuid
from typing import Any

import pytest

from harness.core import gpus as probe
from harness.core.errors import HarnessError
from harness.core.gpus import NO_DEVICE, Answer, Gpu, entry, look, refuse_crowd

CARDS = [("NVIDIA H100 80GB HBM3", 9, 0), ("NVIDIA A10G", 8, 6)]
FULL = [Gpu("H100", "sm_90", 0, "GPU-1"), Gpu("H100", "sm_90", 1, "GPU-2")]
PART = [Gpu("H100 MIG 1g.10gb", "sm_90", 0, "MIG-1")]


class Driver:
    """libcuda's answers for CARDS; `fails` maps a call's name to the status it returns."""

    def __init__(self, fails: dict[str, int] | None = None, cards: list[tuple[str, int, int]] | None = None) -> None:
        self.fails, self.cards = fails or {}, CARDS if cards is None else cards

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self.fails.get("cuInit", 0)

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.cards)
        return self.fails.get("cuDeviceGetCount", 0)

    def cuDeviceGet(self, handle: Any, index: int) -> int:
        handle._obj.value = index + 40  # a handle is not an index
        return self.fails.get("cuDeviceGet", 0)

    def cuDeviceGetName(self, name: Any, size: int, handle: Any) -> int:
        name.value = self.cards[handle.value - 40][0].encode()
        return self.fails.get("cuDeviceGetName", 0)

    def cuDeviceGetAttribute(self, value: Any, attribute: int, handle: Any) -> int:
        value._obj.value = self.cards[handle.value - 40][{75: 1, 76: 2}[attribute]]
        return self.fails.get("cuDeviceGetAttribute", 0)

    def cuDeviceGetUuid(self, identity: Any, handle: Any) -> int:
        ctypes.memmove(identity, uuid.UUID(int=handle.value).bytes, 16)
        return self.fails.get("cuDeviceGetUuid", 0)

    def cuDeviceTotalMem_v2(self, size: Any, handle: Any) -> int:
        size._obj.value = {40: 80 << 30, 41: 24 << 30}[handle.value]
        return self.fails.get("cuDeviceTotalMem", 0)


class NewDriver(Driver):
    def cuDeviceGetUuid_v2(self, identity: Any, handle: Any) -> int:
        ctypes.memmove(identity, uuid.UUID(int=7).bytes, 16)
        return 0


def test_devices_are_listed_as_torch_counts_them() -> None:
    assert look(Driver()).gpus == (
        Gpu("NVIDIA H100 80GB HBM3", "sm_90", 0, "GPU-00000000-0000-0000-0000-000000000028", 80 << 30),
        Gpu("NVIDIA A10G", "sm_86", 1, "GPU-00000000-0000-0000-0000-000000000029", 24 << 30),
    )


def test_the_newer_uuid_is_taken_where_the_driver_has_it() -> None:
    assert {gpu.uuid for gpu in look(NewDriver()).gpus} == {"GPU-00000000-0000-0000-0000-000000000007"}


def test_an_instance_of_a_partitioned_card_is_told_by_its_name() -> None:
    (part,) = look(NewDriver(cards=[("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9, 0)])).gpus
    assert part.partition
    assert part.uuid == "MIG-00000000-0000-0000-0000-000000000007"
    assert not look(Driver()).gpus[0].partition


def test_no_driver_is_no_device_and_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LIBRARY", "libcuda-that-is-not-there.so.1")
    monkeypatch.setattr(subprocess, "run", None)
    assert probe.cuda_devices() == []
    assert probe.trouble() == "no NVIDIA driver (libcuda-that-is-not-there.so.1 is not there)"
    assert not probe.beside_card()
    assert probe.smallest_card() == 0


@pytest.mark.parametrize("status", [34, 803, 804, 999])
def test_a_driver_that_does_not_start_is_no_device_and_says_why(status: int) -> None:
    trouble = f"the CUDA driver does not start (cuInit answers {status}): see nvidia-smi"
    assert look(Driver({"cuInit": status})) == Answer(trouble=trouble)


def test_no_card_reads_as_that_and_names_what_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = look(Driver({"cuInit": NO_DEVICE}))
    assert found == Answer(trouble="the CUDA driver finds no card (cuInit answers 100)")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "no card under CUDA_VISIBLE_DEVICES=7 (" in look(Driver({"cuInit": NO_DEVICE})).trouble
    assert look(Driver(cards=[])) == Answer(trouble="the CUDA driver shows no card")


@pytest.mark.parametrize(
    "call", ["cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute", "cuDeviceTotalMem"]
)
def test_a_driver_that_breaks_off_is_not_read_as_no_card(call: str) -> None:
    with pytest.raises(HarnessError, match=rf"the CUDA driver answers {call} with error 46: see nvidia-smi"):
        look(Driver({call: 46}))


@pytest.mark.parametrize(
    ("place", "visible", "expected"),
    [
        (0, None, "0"),
        (1, None, "1"),
        (1, "", "1"),
        (1, "5,3", "3"),
        (0, "5,3", "5"),
        (1, "GPU-aa, GPU-bb", "GPU-bb"),
    ],
)
def test_each_worker_takes_one_of_the_callers_cards(place: int, visible: str | None, expected: str) -> None:
    assert entry(place, visible) == expected


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (FULL, r"^3 workers but 2 GPUs visible: use -n 2, each worker takes one GPU$"),
        (FULL[:1], r"^3 workers but 1 GPU visible: use -n 1, each worker takes one GPU$"),
        (
            PART,
            r"^3 workers but 1 GPU visible: of a partitioned card \(MIG\) CUDA shows a process one .*--shard$",
        ),
    ],
)
def test_more_workers_than_cards_is_refused(gpus: list[Gpu], message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        refuse_crowd(3, gpus)
    refuse_crowd(len(gpus), gpus)


def test_looking_imports_no_torch() -> None:
    code = "import sys, harness.core.gpus as p; p.cuda_devices(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
