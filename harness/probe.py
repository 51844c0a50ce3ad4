"""A look at the CUDA devices without torch: through the driver's own library, which honours CUDA_VISIBLE_DEVICES.

Only cuInit and questions: no context is made, so a process that looked may still start others that compute.
"""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import HarnessError

LIBRARY = "libcuda.so.1"  # what the driver installs; the toolkit is not needed
# CUdevice_attribute of cuda.h: stable numbers of the driver's interface
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """One visible device; `index` counts within CUDA_VISIBLE_DEVICES, as torch counts."""

    name: str
    sm: str  # 'sm_90'
    index: int
    uuid: str = ""  # 'GPU-...', as nvidia-smi prints it


def open_library() -> Any | None:
    """The driver's library, or None where there is no driver."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None


def trouble(library: Any | None = None) -> str:
    """Why no device can be used, '' where the driver starts; for messages and `doctor`.

    Any refusal of cuInit counts as no device, as it does for torch: no card (100), a stub (34), a driver and a
    library that disagree (803, 804) or a driver left broken by a suspend (999).
    """
    library = open_library() if library is None else library
    if library is None:
        return f"no NVIDIA driver ({LIBRARY} is not there)"
    status = library.cuInit(0)
    return f"the CUDA driver does not start (cuInit answers {status}): see nvidia-smi" if status else ""


def cuda_devices(library: Any | None = None) -> list[Gpu]:
    """The visible CUDA devices; [] without a usable driver (`trouble` says why) or with nothing visible.

    Args:
        library: stands in for the driver's library (tests).

    Raises:
        HarnessError: a driver that starts and then answers with an error, which must not read as "no card".
    """
    library = open_library() if library is None else library
    if library is None or trouble(library):
        return []
    count = ctypes.c_int()
    _check(library.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    return [_device(library, index) for index in range(count.value)]


def smallest_card(library: Any | None = None) -> int:
    """Bytes of the smallest visible device's memory, 0 where there is none."""
    library = open_library() if library is None else library
    sizes = []
    for gpu in cuda_devices(library):
        assert library is not None
        handle, size = ctypes.c_int(), ctypes.c_size_t()
        _check(library.cuDeviceGet(ctypes.byref(handle), gpu.index), "cuDeviceGet")
        _check(library.cuDeviceTotalMem_v2(ctypes.byref(size), handle), "cuDeviceTotalMem")
        sizes.append(size.value)
    return min(sizes, default=0)


def _device(library: Any, index: int) -> Gpu:
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(NAME_BYTES)
    identity = ctypes.create_string_buffer(16)
    _check(library.cuDeviceGet(ctypes.byref(handle), index), "cuDeviceGet")
    _check(library.cuDeviceGetName(name, NAME_BYTES, handle), "cuDeviceGetName")
    for value, attribute in ((major, CAPABILITY_MAJOR), (minor, CAPABILITY_MINOR)):
        _check(library.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle), "cuDeviceGetAttribute")
    # the second version tells the slices of a partitioned card apart, where the driver has it
    ask = getattr(library, "cuDeviceGetUuid_v2", None) or library.cuDeviceGetUuid
    _check(ask(identity, handle), "cuDeviceGetUuid")
    sm = f"sm_{major.value}{minor.value}"
    return Gpu(name.value.decode(errors="replace"), sm, index, f"GPU-{uuid.UUID(bytes=identity.raw)}")


def _check(status: int, call: str) -> None:
    if status:
        raise HarnessError(f"the CUDA driver answers {call} with error {status}: see nvidia-smi")


def worker_devices(worker_index: int, worker_count: int, visible: str | None, count: int) -> str:
    """The CUDA_VISIBLE_DEVICES of one xdist worker: its own card of the caller's list.

    Args:
        worker_index: 0-based, below `worker_count`.
        worker_count: workers of the session.
        visible: the caller's CUDA_VISIBLE_DEVICES, indices or UUIDs; None or "" where it is not set.
        count: devices that the driver shows under it (CUDA ignores everything from the first bad entry on).

    Raises:
        HarnessError: more workers than cards; two would share one card's memory and time.
    """
    if worker_count > count:
        cards = f"{count} GPU{'s' if count != 1 else ''}"
        raise HarnessError(f"{worker_count} workers but {cards} visible: use -n {count}, each worker takes one GPU")
    entries: Sequence[str] = [entry.strip() for entry in visible.split(",")] if visible else []
    return entries[worker_index] if entries else str(worker_index)
