"""The device look through a library that answers as the driver would; worker pinning by hand."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import uuid
from typing import Any

import pytest

from harness import probe
from harness.errors import HarnessError
from harness.probe import Gpu, cuda_devices, worker_devices

CARDS = [("NVIDIA H100 80GB HBM3", 9, 0), ("NVIDIA A10G", 8, 6)]


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


def test_the_smallest_card_is_the_one_a_share_must_fit() -> None:
    assert probe.smallest_card(Driver()) == 24 << 30
    assert probe.smallest_card(Driver(cards=[])) == 0
    with pytest.raises(HarnessError, match="cuDeviceTotalMem with error 3"):
        probe.smallest_card(Driver({"cuDeviceTotalMem": 3}))


def test_devices_are_listed_as_torch_counts_them() -> None:
    assert cuda_devices(Driver()) == [
        Gpu("NVIDIA H100 80GB HBM3", "sm_90", 0, "GPU-00000000-0000-0000-0000-000000000028"),
        Gpu("NVIDIA A10G", "sm_86", 1, "GPU-00000000-0000-0000-0000-000000000029"),
    ]


def test_the_newer_uuid_is_taken_where_the_driver_has_it() -> None:
    assert {gpu.uuid for gpu in cuda_devices(NewDriver())} == {"GPU-00000000-0000-0000-0000-000000000007"}


def test_no_driver_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LIBRARY", "libcuda-that-is-not-there.so.1")
    assert cuda_devices() == []
    assert probe.trouble() == "no NVIDIA driver (libcuda-that-is-not-there.so.1 is not there)"


@pytest.mark.parametrize("status", [100, 34, 803, 999])
def test_a_driver_that_does_not_start_is_no_device_and_says_why(status: int) -> None:
    assert cuda_devices(Driver({"cuInit": status})) == []
    assert probe.trouble(Driver({"cuInit": status})) == (
        f"the CUDA driver does not start (cuInit answers {status}): see nvidia-smi"
    )


def test_a_driver_that_starts_is_no_trouble() -> None:
    assert probe.trouble(Driver()) == ""


def test_no_visible_card_is_no_device() -> None:
    assert cuda_devices(Driver(cards=[])) == []


@pytest.mark.parametrize("call", ["cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute"])
def test_a_driver_that_breaks_off_is_not_read_as_no_card(call: str) -> None:
    with pytest.raises(HarnessError, match=rf"the CUDA driver answers {call} with error 46: see nvidia-smi"):
        cuda_devices(Driver({call: 46}))


@pytest.mark.parametrize(
    ("index", "workers", "visible", "count", "expected"),
    [
        (0, 2, None, 2, "0"),
        (1, 2, None, 2, "1"),
        (1, 2, "", 4, "1"),
        (1, 2, "5,3", 2, "3"),
        (0, 1, "5,3", 2, "5"),
        (1, 2, "GPU-aa, GPU-bb", 2, "GPU-bb"),
    ],
)
def test_each_worker_takes_one_of_the_callers_cards(
    index: int, workers: int, visible: str | None, count: int, expected: str
) -> None:
    assert worker_devices(index, workers, visible, count) == expected


@pytest.mark.parametrize(
    ("visible", "count", "message"),
    [
        ("0,1", 2, r"3 workers but 2 GPUs visible: use -n 2, each worker takes one GPU"),
        ("0,-1,1", 1, r"3 workers but 1 GPU visible: use -n 1, each worker takes one GPU"),
    ],
)
def test_more_workers_than_cards_is_refused(visible: str, count: int, message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        worker_devices(0, 3, visible, count)


def test_looking_imports_no_torch() -> None:
    code = "import sys, harness.probe as p; p.cuda_devices(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
