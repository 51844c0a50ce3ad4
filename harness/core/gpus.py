"""A look at the CUDA devices without torch: through the driver's own library, which honours CUDA_VISIBLE_DEVICES.

The driver reads that variable once a process, and a process that asked it can fork none that computes. So each question
is asked in a short process of its own, under the variable as it stands then; where there is no driver none is started.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.core.errors import HarnessError

LIBRARY = "libcuda.so.1"  # what the driver installs; the toolkit is not needed
VISIBLE = "CUDA_VISIBLE_DEVICES"
# CUdevice_attribute of cuda.h: stable numbers of the driver's interface
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
NAME_BYTES = 256
NO_DEVICE = 100  # cuInit where the driver is sound and shows no card
ANSWER_SECONDS = 120  # without its persistence daemon a driver wakes every card first
ONE_PARTITION = "of a partitioned card (MIG) CUDA shows a process one instance, whatever is listed"


@dataclass(frozen=True)
class Gpu:
    """One visible device; `index` counts within CUDA_VISIBLE_DEVICES, as torch counts."""

    name: str
    sm: str  # 'sm_90'
    index: int
    uuid: str = ""  # 'GPU-...' or 'MIG-...', as nvidia-smi prints it and CUDA_VISIBLE_DEVICES takes it
    memory: int = 0  # bytes

    @property
    def partition(self) -> bool:
        """Whether it is an instance of a partitioned card, of which a process sees one."""
        return self.uuid.startswith("MIG-")


@dataclass(frozen=True)
class Answer:
    """What the driver said: the visible devices, why there is none, or how it broke off."""

    gpus: tuple[Gpu, ...] = ()
    trouble: str = ""
    broken: str = ""


def open_library() -> Any | None:
    """The driver's library, or None where there is no driver."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None


def trouble() -> str:
    """Why no device can be used, '' where one can; for messages and `doctor`."""
    answer = now()
    return answer.trouble or answer.broken


def cuda_devices() -> list[Gpu]:
    """The visible CUDA devices; [] without a usable driver (`trouble` says why) or with nothing visible.

    Raises:
        HarnessError: a driver that starts and then answers with an error, or never, which must not read as "no card".
    """
    answer = now()
    if answer.broken:
        raise HarnessError(answer.broken)
    return list(answer.gpus)


def now() -> Answer:
    """The driver's answer under this process's CUDA_VISIBLE_DEVICES as it stands."""
    return asked(os.environ.get(VISIBLE))


def smallest_card() -> int:
    """Bytes of memory of the machine's smallest device, visible or not, 0 where there is none."""
    return min((gpu.memory for gpu in asked(None).gpus), default=0)


def beside_card() -> bool:
    """Whether this machine has a card, visible or not, or a driver so broken that it must be left alone."""
    answer = asked(None)
    return bool(answer.gpus or answer.broken)


def asked(visible: str | None) -> Answer:
    """The driver's answer under a CUDA_VISIBLE_DEVICES, None for none, from a process of its own, kept."""
    if open_library() is None:
        return Answer(trouble=f"no NVIDIA driver ({LIBRARY} is not there)")
    return _asked(visible, LIBRARY)


@functools.cache
def _asked(visible: str | None, library: str) -> Answer:
    world = {name: value for name, value in os.environ.items() if name != VISIBLE}
    world |= {} if visible is None else {VISIBLE: visible}
    world["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-S", "-P", "-c", "from harness.core import gpus; gpus.tell()", library]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", env=world, timeout=ANSWER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Answer(broken=f"the CUDA driver does not answer within {ANSWER_SECONDS} s: see nvidia-smi")
    if done.returncode:
        how = f"exit status {done.returncode}"
        return Answer(broken=f"the CUDA driver ends the process that asks it ({how}): see nvidia-smi")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Answer(**answer | {"gpus": tuple(Gpu(**gpu) for gpu in answer["gpus"])})


def tell() -> None:
    """Print what the driver says to this process, as one line of JSON."""
    try:
        answer = look(ctypes.CDLL(sys.argv[1]))
    except HarnessError as error:
        answer = Answer(broken=str(error))
    print(json.dumps(asdict(answer)))


def look(library: Any) -> Answer:
    """What a driver's library says in this process.

    Any refusal of cuInit counts as no device, as it does for torch: no card (100), a stub (34), a driver and a
    library that disagree (803, 804) or a driver left broken by a suspend (999).

    Raises:
        HarnessError: it starts and then answers with an error.
    """
    status = library.cuInit(0)
    if status == NO_DEVICE:
        hidden = f" under {VISIBLE}={os.environ[VISIBLE]}" if VISIBLE in os.environ else ""
        return Answer(trouble=f"the CUDA driver finds no card{hidden} (cuInit answers {status})")
    if status:
        return Answer(trouble=f"the CUDA driver does not start (cuInit answers {status}): see nvidia-smi")
    count = ctypes.c_int()
    _check(library.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    gpus = tuple(_device(library, index) for index in range(count.value))
    return Answer(gpus, "" if gpus else "the CUDA driver shows no card")


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
    size = ctypes.c_size_t()
    _check(library.cuDeviceTotalMem_v2(ctypes.byref(size), handle), "cuDeviceTotalMem")
    said, sm = name.value.decode(errors="replace"), f"sm_{major.value}{minor.value}"
    kind = "MIG" if " MIG " in f"{said} " else "GPU"  # 'NVIDIA H100 80GB HBM3 MIG 1g.10gb'
    return Gpu(said, sm, index, f"{kind}-{uuid.UUID(bytes=identity.raw)}", size.value)


def _check(status: int, call: str) -> None:
    if status:
        raise HarnessError(f"the CUDA driver answers {call} with error {status}: see nvidia-smi")


def refuse_crowd(workers: int, gpus: Sequence[Gpu]) -> None:
    """HarnessError where a session has more xdist workers than cards: two would share one card's memory and time."""
    if workers <= len(gpus):
        return
    cards = f"{len(gpus)} GPU{'s' if len(gpus) != 1 else ''}"
    fix = f"use -n {len(gpus)}, each worker takes one GPU"
    if any(gpu.partition for gpu in gpus):
        fix = f"{ONE_PARTITION}: start a session an instance, each with its own {VISIBLE} and --shard"
    raise HarnessError(f"{workers} workers but {cards} visible: {fix}")


def entry(place: int, visible: str | None) -> str:
    """The CUDA_VISIBLE_DEVICES that shows one card of the caller's list alone.

    Args:
        place: 0-based, below the number of visible devices (CUDA ignores everything from the first bad entry on).
        visible: the caller's CUDA_VISIBLE_DEVICES, indices or UUIDs; None where it is not set.
    """
    return [part.strip() for part in visible.split(",")][place] if visible else str(place)
