"""Loops over codes that Numba compiles for this processor, where it is installed: what all of them share.

A token's decode reads every weight once, so that bytes are time: a dequantized weight is written and read again, four
bytes an element. A loop unpacks a row of the weight where it is multiplied, in registers or in the cache; up to
`products.FEW_ROWS` rows of fp32 are multiplied so. For more the whole weight is unpacked, to the bits of `decode`.
Loading a model takes loops too, to the bits of `encode`: torch needs some ten operations a weight. Without Numba torch
does all of it, and the environment of a row says which did.

Rows of a weight are shared out between threads, so that no figure depends on how many there are. Sums may be taken in
any order, which lets them run in vector registers: the order is that of the processor's width. What unpacks is without
that leave, so that it rounds as `decode` does. Activations are never rounded, sums are fp32.

A representation's loops stand in its own file, as functions that `loop` marks and `compile_loops` replaces. All that a
loop calls stands in the same file: Numba's cache sees a change only in the file of the loop.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

from harness.core.environment import BY_TORCH, COMPILED

if TYPE_CHECKING:  # annotations only: methods are listed without torch
    import numpy as np
    from torch import Tensor

    Array = np.ndarray[Any, Any]

SUMS = {"reassoc", "contract"}  # LLVM's fast-math flags that sums need; without the others not a number stays so
ALONE = 2**20  # elements of a product that one thread is done with about when others would have woken
SOON = 2**18  # elements to unpack, likewise: fewer, as a product waits for them
Function = TypeVar("Function", bound=Callable[..., Any])
_options: dict[FunctionType, dict[str, Any]] = {}  # of the functions that `loop` marks
_running = threading.local()
_one_at_a_time = threading.Lock()  # compiles; and not every threading layer of Numba takes calls from several threads


@functools.cache
def available() -> bool:
    """Whether Numba is installed, for this Python and this NumPy."""
    try:
        import numba  # noqa: F401
    except Exception:  # one that is there and broken says so in many ways; torch does the same then, and rows say it
        return False
    return True


def runner() -> str:
    """What an environment says of the loops."""
    return COMPILED if available() else BY_TORCH


def loop(**options: Any) -> Callable[[Function], Function]:
    """Mark a function that Numba is to compile, with `njit`'s options."""

    def mark(function: Function) -> Function:
        assert isinstance(function, FunctionType)
        _options[function] = options
        return function

    return mark


@functools.cache
def compile_loops(module: str, more: Callable[[], Mapping[str, Any]] = dict) -> None:
    """Put a compiled loop in the place of each marked function of a module, where the loops find each other.

    Each is compiled at its first call, or read from the harness's cache.

    Args:
        module: by name.
        more: gives names of the module that depend on the processor.
    """
    import numba

    from harness.core.files import cache_dir

    # beside converted checkpoints, unless NUMBA_CACHE_DIR says where: the module's own folder may be read-only
    numba.config.CACHE_DIR = numba.config.CACHE_DIR or str(cache_dir() / "numba")
    names = vars(sys.modules[module])
    with _one_at_a_time:
        for name, function in list(names.items()):
            if isinstance(function, FunctionType) and function in _options:
                names[name] = njit(function, **_options[function])
        names.update({"prange": numba.prange} | dict(more()))


def njit(function: Callable[..., Any], **options: Any) -> Any:
    """Numba's, which takes no loop that it may keep where no folder can be written: then each process compiles it."""
    import numba

    try:
        return numba.njit(**options)(function)
    except RuntimeError:
        return numba.njit(**options | {"cache": False})(function)


def threads(wanted: int) -> int:
    """Have as many threads run the loops, of those Numba started with: how many they are."""
    import numba
    import torch

    count: int = max(1, min(wanted, numba.config.NUMBA_NUM_THREADS))
    if getattr(_running, "threads", None) != count:  # a token's 200 products would feel the call
        before = torch.get_num_threads()
        numba.set_num_threads(count)
        torch.set_num_threads(before)  # Numba's first launch sets OpenMP's number for torch too, to every core
        _running.threads = count
    return count


@dataclass(frozen=True)
class Loops:
    """What is run on a weight's codes where they lie, so that what is loaded into them later counts.

    Attributes:
        weight: what the loops take.
        shape: (out, in).
        product: x W^T by one thread, (x, weight, result, start, stop), and shared out, (..., rows, threads).
        rows: rows of W by one thread, (weight, first, result, start, stop), and shared out.
    """

    weight: tuple[Any, ...]
    shape: tuple[int, int]
    product: tuple[Callable[..., None], Callable[..., None]]
    rows: tuple[Callable[..., None], Callable[..., None]]

    def multiply(self, x: Tensor) -> Tensor:
        """Compute x W^T: (..., in) fp32 contiguous -> (..., out) fp32."""
        import torch

        outputs, inputs = self.shape
        result = torch.empty(*x.shape[:-1], outputs)
        given = x.numpy().reshape(-1), self.weight, result.numpy().reshape(-1)
        _run(self.product, given, outputs, many=outputs * inputs > ALONE)
        return result

    def unpack(self, first: int, result: Tensor) -> None:
        """Write rows of the weight, from the first on, into `result` (rows, in) fp32."""
        given = self.weight, first, result.numpy().reshape(-1)
        _run(self.rows, given, len(result), many=result.numel() > SOON)

    def decode(self) -> Tensor:
        """The whole weight, (out, in) fp32."""
        import torch

        result = torch.empty(self.shape)
        self.unpack(0, result)
        return result


def _run(loop: tuple[Callable[..., None], Callable[..., None]], given: Sequence[Any], rows: int, many: bool) -> None:
    """Run a loop over rows, shared out between as many threads as torch has where the work is worth it."""
    import torch

    count = threads(torch.get_num_threads()) if many else 1
    if count == 1:
        loop[0](*given, 0, rows)
        return
    with _one_at_a_time:
        loop[1](*given, rows, count)


@dataclass(frozen=True)
class Rounding:
    """A loop that turns a weight into codes in one pass over it as it lies.

    Attributes:
        result: room for the whole weight's codes and scale.
        unit: weights that share a scale, all in one row.
        loop: (bits (units, unit), codes, scale) -> None, where `result` has a line for each unit. Bits are uint32 of
            fp32 or uint16 of bf16, which are the upper half of fp32's.
    """

    result: dict[str, Tensor]
    unit: int
    loop: Callable[[Array, Array, Array], None]

    def fill(self, start: int, rows: Tensor) -> None:
        """Quantize rows of the weight, from `start` on: (rows, in) fp32 or bf16, contiguous."""
        import torch

        bits = rows.view(torch.uint32 if rows.dtype == torch.float32 else torch.uint16).view(-1, self.unit)
        first = start * rows.shape[1] // self.unit
        codes, scale = self.result["codes"], self.result["scale"].view(-1)
        lines = codes.view(len(scale), -1)[first : first + len(bits)], scale[first : first + len(bits)]
        self.loop(bits.numpy(), *(line.numpy() for line in lines))
