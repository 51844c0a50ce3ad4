"""A CPU build of torch that looks like a CUDA one, in the fork server and its children: who asks for a card there?

Like torch's own, each of these calls starts the driver (`_cuda_getDeviceCount` too: torch/csrc/cuda/Module.cpp) and
leaves every process that is forked later unable to. Imported by a sitecustomize, where a test puts one; a real CUDA
build is left as it is, but for the touch that a test asks for.

CUDA_BUILD_LOG    a file: a line for each touch of torch.cuda ('PID touched NAME') and each fork ('PID forked good')
CUDA_BUILD_TOUCH  set: a card is asked for at once, as a careless sitecustomize would
"""

from __future__ import annotations

import ctypes
import os
import sys
import types
from pathlib import Path
from typing import Any

SITE = "from tests.rehearsal import cuda_build\ncuda_build.begin()\n"  # of the sitecustomize.py
STATE = {"armed": False, "bad": False}


def begin() -> None:
    """In the fork server, pretend; anywhere else do nothing."""
    if "forkserver" not in " ".join(sys.orig_argv):
        return
    import torch

    if torch.version.cuda is None:
        pretend(torch)
    os.register_at_fork(after_in_child=forked)
    if "CUDA_BUILD_TOUCH" in os.environ:
        torch.cuda.is_available()


def write(line: str) -> None:
    if path := os.environ.get("CUDA_BUILD_LOG"):
        with Path(path).open("a") as file:
            file.write(f"{os.getpid()} {line}\n")


def forked() -> None:
    import torch

    STATE["bad"] = STATE["armed"]
    write(f"forked {'bad' if torch.cuda._is_in_bad_fork() else 'good'}")


def touched(name: str, answer: Any) -> Any:
    """A function that starts the driver, as torch's does, and answers."""

    def call(*args: Any, **kwargs: Any) -> Any:
        write(f"touched {name}")
        STATE["armed"] = True
        status = ctypes.CDLL("libcuda.so.1").cuInit(0)
        return answer if status == 0 else 0

    return call


def pretend(torch: Any) -> None:
    """Torch as compiled for CUDA 13, with a card of compute capability 9.0 where the driver shows one."""
    torch.version.cuda = "13.0"
    torch._C._cuda_getDeviceCount = touched("_cuda_getDeviceCount", 1)
    torch._C._cuda_init = touched("_cuda_init", None)
    torch._C._cuda_getArchFlags = lambda: "sm_90"
    torch._C._cuda_getCurrentRawStream = lambda index: 0  # what compilers import by name
    torch.cuda._is_compiled = lambda: True
    torch.cuda._cudart = object()
    torch.cuda._queued_calls.clear()
    torch.cuda._device_count_nvml = lambda: -1
    torch.cuda._is_in_bad_fork = lambda: STATE["bad"]
    card = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="Stub H100", total_memory=80 << 30)
    torch.cuda.get_device_properties = touched("get_device_properties", card)
