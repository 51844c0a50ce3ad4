"""The world a number was made in: versions, device, threads, checkout; captured, compared, named. No torch.

Three names of growing reach are derived from it. `id` stands for everything but the checkout, so that rows of one
session and a resumed one point at the same entry of environments.json (the harness's own source is in the resume
key). `environment_class` is the device class with a digest of versions and thread settings: a latency is carried
within it, on one machine. `device_class` ('cpu:avx512', 'cuda:sm_90') is how far a perplexity is carried.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.core.errors import HarnessError
from harness.core.gpus import Gpu, cuda_devices, trouble
from harness.core.schema import fit
from harness.core.values import digest

LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "bitsandbytes", "datasets", "numpy", "kernels")
# what moves a timing or a byte on one machine; the processor and the card are in the machine id
CLASS_FIELDS = ("python", *LIBRARIES, "bitsandbytes_library", "driver", "cuda", "threads")
WAITING = ("wait_policy", "spin_count", "thread_library")  # what moves a time alone: `waiting_difference`
COMPILED, BY_TORCH = "compiled", "torch"  # what runs loops over codes: Numba, or torch where it is not installed
LATER = {
    "loops": COMPILED,
    "spin_count": "",
    "thread_library": "",
}  # younger than records, and what held then
CHECKOUT = ("commit", "dirty")  # provenance, not world: the same code measures the same from any commit
# flags of /proc/cpuinfo that choose a kernel in torch or bitsandbytes, most capable last
INSTRUCTIONS = {"avx2": "avx2", "avx512f": "avx512", "avx512_bf16": "avx512_bf16", "amx_tile": "amx"}
SALT = "llm-quantization-harness machine id 1"  # so that the id says "the same machine" and nothing else
CPUINFO, MACHINE_ID = Path("/proc/cpuinfo"), Path("/etc/machine-id")
DRIVER_VERSION = Path("/sys/module/nvidia/version")
FIELDS_NAMED = 3  # of a class's difference in one line; a failure's report lists all
GIT_SECONDS = 10  # a checkout on a slow network disk must not hold up a measurement


@dataclass(frozen=True)
class Environment:
    """One world, flat; '' where a fact does not apply or is not known."""

    device: str = "cpu"  # or 'cuda'
    python: str = ""
    torch: str = ""
    transformers: str = ""
    tokenizers: str = ""
    accelerate: str = ""
    bitsandbytes: str = ""
    bitsandbytes_library: str = ""  # file name of the shared library that it loaded
    datasets: str = ""
    numpy: str = ""
    kernels: str = ""  # version of the distribution; '' absent: bitsandbytes then uses its own CPU kernels
    gpu: str = ""
    sm: str = ""  # 'sm_90'
    driver: str = ""
    cuda: str = ""  # that torch was built with
    cpu: str = ""
    instructions: str = ""  # 'avx2 avx512'
    threads: int = 0
    wait_policy: str = ""  # OMP_WAIT_POLICY
    spin_count: str = ""  # GOMP_SPINCOUNT
    thread_library: str = ""  # file name of the one that torch runs its threads by
    loops: str = COMPILED  # or BY_TORCH
    commit: str = ""  # of the checkout that holds the cases
    dirty: bool = False
    machine: str = ""  # salted hash

    @property
    def id(self) -> str:
        """12 hex digits over every field but the checkout's."""
        facts = {key: value for key, value in asdict(self).items() if key not in (*CHECKOUT, *LATER)}
        return digest(facts | self._later)[:12]

    @property
    def _later(self) -> dict[str, str]:
        return {name: getattr(self, name) for name, usual in LATER.items() if getattr(self, name) != usual}

    @property
    def device_class(self) -> str:
        """'cuda:sm_90', 'cpu:avx512_bf16', 'cpu:avx512', 'cpu:avx2', else 'cpu:' and the architecture."""
        if self.device == "cuda":
            return f"cuda:{self.sm or 'unknown'}"
        levels = [name for name in self.instructions.split() if name.startswith("avx")]
        return f"cpu:{levels[-1]}" if levels else f"cpu:{self.instructions or 'unknown'}"

    @property
    def environment_class(self) -> str:
        """The device class with 8 hex digits over versions and thread settings."""
        facts = {name: getattr(self, name) for name in CLASS_FIELDS} | {"wait_policy": "passive"}  # as it always was
        later = {"loops": self.loops} if self.loops != COMPILED else {}
        return f"{self.device_class}:{digest(facts | later)[:8]}"

    def to_dict(self) -> dict[str, Any]:
        """Flat JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Environment:
        """Read it back; a field that is not known here is ignored, one that is absent keeps its default.

        BadFile names a field of the wrong type.
        """
        return fit(data, cls, "environment")


def capture(device: str, threads: int, loaded: Mapping[str, str] | None = None) -> Environment:
    """This process's world.

    Args:
        device: 'cpu' or 'cuda' (the first visible card).
        threads: of the compute pool.
        loaded: what only the loaded libraries know: 'cuda', 'bitsandbytes_library', 'loops', 'thread_library'.

    Raises:
        HarnessError: 'cuda' without a visible card.
    """
    cpu, instructions = processor(CPUINFO)
    facts: dict[str, Any] = {name: installed_version(name) for name in LIBRARIES} | dict(loaded or {})
    if device == "cuda":
        card = first_card()
        driver = DRIVER_VERSION.read_text(encoding="utf-8").strip() if DRIVER_VERSION.is_file() else ""
        facts |= {"gpu": card.name, "sm": card.sm, "driver": driver, "machine": machine_id(card.name)}
    else:
        facts["machine"] = machine_id(cpu)
    return Environment(
        device=device,
        python=platform.python_version(),
        cpu=cpu,
        instructions=instructions,
        threads=threads,
        wait_policy=os.environ.get("OMP_WAIT_POLICY", ""),
        spin_count=os.environ.get("GOMP_SPINCOUNT", ""),
        **facts,
        **checkout(Path.cwd()),
    )


def first_card() -> Gpu:
    """The visible card that work goes to."""
    cards = cuda_devices()
    if not cards:
        raise HarnessError(f"no CUDA device: {trouble()}; use --device cpu")
    return cards[0]


def installed_version(distribution: str) -> str:
    """A distribution's version, '' when it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


@functools.cache
def cpu_facts(cpuinfo: Path = CPUINFO) -> dict[str, str]:
    """What Linux says of the first processor, by name; empty where it says nothing."""
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def processor(cpuinfo: Path) -> tuple[str, str]:
    """The model's name and the instruction sets of INSTRUCTIONS that it has; where it has none, the architecture."""
    facts = cpu_facts(cpuinfo)
    flags = facts.get("flags", "").split()
    present = [name for flag, name in INSTRUCTIONS.items() if flag in flags]
    architecture = re.sub(r"\W", "_", platform.machine().lower())
    fallback = "x86" if architecture in {"x86_64", "amd64", "i686"} else architecture
    return facts.get("model name", "") or platform.processor() or architecture, " ".join(present) or fallback


def usable_cores() -> frozenset[int]:
    """Numbers of the cores that this process may use; of all that there are where the system does not say (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def machine_id(part: str) -> str:
    """16 hex digits for this host with a model of processor or card; cannot be turned back into the host's id.

    Equal cards of one host are one machine, as equal cores are: which of them a case got says nothing of its figure.
    """
    host = MACHINE_ID.read_text(encoding="utf-8").strip() if MACHINE_ID.is_file() else ""
    return hashlib.sha256("\0".join((SALT, host or socket.gethostname(), part)).encode()).hexdigest()[:16]


def checkout(folder: Path) -> dict[str, Any]:
    """Commit and dirty flag (tracked files) of the git checkout around a folder; neither where there is none."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return {"commit": "", "dirty": False}
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str:
    """A git command's output, '' where git or the checkout is absent; never takes the index's lock."""
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=GIT_SECONDS, env=quiet
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""  # no git here: the checkout is unknown, which is what '' says
    return done.stdout.strip() if done.returncode == 0 else ""


def difference(before: Environment, now: Environment) -> list[str]:
    """What changed, one line a field: 'bitsandbytes: 0.48.2 -> 0.50.2', in the order of the fields."""
    pairs = ((item.name, getattr(before, item.name), getattr(now, item.name)) for item in fields(Environment))
    return [f"{name}: {_shown(old)} -> {_shown(new)}" for name, old, new in pairs if old != new]


def class_difference(before: Environment, now: Environment) -> str:
    """Why a figure of one environment class does not reach another, in one line; '' within one class."""
    if before.device_class != now.device_class:
        return f"device class: {before.device_class} -> {now.device_class}"
    lines = [line for line in difference(before, now) if line.partition(":")[0] in (*CLASS_FIELDS, "loops")]
    more = len(lines) - FIELDS_NAMED
    return ", ".join(lines[:FIELDS_NAMED]) + (f" and {more} more" if more > 0 else "")


def waiting_difference(before: Environment, now: Environment) -> str:
    """Why a time of one world is not one of another though both are of one class; '' where threads wait alike.

    A library that is not known, as in records of before it was noted, is no difference.
    """
    known = before.thread_library and now.thread_library
    names = WAITING if known else WAITING[:2]
    return ", ".join(line for line in difference(before, now) if line.partition(":")[0] in names)


def _shown(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value) or "absent"
