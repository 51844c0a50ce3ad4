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

import contextlib
import functools
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

from platformdirs import user_cache_path

from harness.core.environment import BY_TORCH, COMPILED
from harness.core.files import NAME, cache_dir

if TYPE_CHECKING:  # annotations only: methods are listed without torch
    import numpy as np
    import torch
    from torch import Tensor

    Array = np.ndarray[Any, Any]

SUMS = {"reassoc", "contract"}  # LLVM's fast-math flags that sums need; without the others not a number stays so
ALONE = 2**20  # elements of a product that one thread is done with about when others would have woken
SOON = 2**18  # elements to unpack, likewise: fewer, as a product waits for them
SEAL_BYTES = 32  # a sha256 behind a file's content
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

    home, _ = kept_in()
    numba.config.CACHE_DIR = str(home or "")
    names = vars(sys.modules[module])
    with _one_at_a_time:
        for name, function in list(names.items()):
            if isinstance(function, FunctionType) and function in _options:
                options = _options[function] if home else _options[function] | {"cache": False}
                names[name] = njit(function, **options)
        names.update({"prange": numba.prange} | dict(more()))


def kept_in() -> tuple[Path | None, str]:
    """Where compiled loops lie between processes, None where nowhere; and a line where that is not the place meant.

    That is beside converted checkpoints, unless NUMBA_CACHE_DIR says where: the module's own folder may be read-only.
    What lies there is run, so that a folder in which others can write is passed over for one of the user's own.
    """
    wanted = Path(os.environ.get("NUMBA_CACHE_DIR") or cache_dir() / "numba")
    note = ""
    for home in (wanted, user_cache_path(NAME) / "numba-own"):
        with contextlib.suppress(OSError):  # a read-only cache: each process compiles its loops
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
        foreign = written_by_others(home)
        if foreign is None:
            return home, note and f"{note}: {home} is used"
        note = note or f"what others can write is not run as compiled loops (chmod -R go-w {foreign}, if it is yours)"
    return None, f"{note}: each process compiles its own"


def written_by_others(home: Path) -> Path | None:
    """The first of a folder and what lies in it that is another user's or open to others' writing; None without any."""
    try:
        top = home.stat()
    except FileNotFoundError:
        return None
    except OSError:
        return home  # nobody can say who writes there
    with contextlib.suppress(FileNotFoundError):
        closed = top.st_uid == os.geteuid() and not top.st_mode & 0o011  # nobody else gets in
        for path in () if closed else (home, *home.glob("*"), *home.glob("*/*")):
            with contextlib.suppress(FileNotFoundError):  # another process has just replaced it
                status = path.stat()
                if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                    return path
    return None


def njit(function: Callable[..., Any], **options: Any) -> Any:
    """Numba's, its cache sealed; where no folder can be written, or Numba keeps files otherwise, without a cache."""
    import numba

    try:
        compiled = numba.njit(**options)(function)
        if options.get("cache"):
            if not Path(compiled._cache.cache_path).is_relative_to(numba.config.CACHE_DIR):
                raise RuntimeError("Numba fell back on a folder that nobody has looked at")
            seal(compiled._cache._cache_file)
    except (RuntimeError, AttributeError):
        return numba.njit(**options | {"cache": False})(function)
    return compiled


def seal(files: Any) -> None:
    """Hold each file of a loop's cache to the sha256 behind its content: one that is damaged goes, and is made again.

    Numba by itself unpickles, and runs, whatever lies there. `files` is Numba's own reader and writer of them.
    """
    read_index, read_data, opened, save = files._load_index, files._load_data, files._open_for_write, files.save

    def index() -> Any:
        return read_index() if whole(Path(files._index_path)) else {}

    def data(name: str) -> Any:
        if not whole(Path(files._data_path(name))):
            raise FileNotFoundError(name)  # which Numba takes for an entry that was removed
        return read_data(name)

    @contextlib.contextmanager
    def sealing(path: str) -> Iterator[io.BytesIO]:
        with opened(path) as file:
            content = io.BytesIO()
            yield content
            file.write(content.getvalue() + sha256(content.getvalue()).digest())

    def keep(key: Any, value: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk: it is compiled again next time
            save(key, value)

    files._load_index, files._load_data, files._open_for_write, files.save = index, data, sealing, keep


def whole(path: Path) -> bool:
    """Whether a sealed file is as it was written; one that is not is deleted."""
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        if sha256(content[:-SEAL_BYTES]).digest() == content[-SEAL_BYTES:]:
            return True
        path.unlink()
    return False


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

    def multiply(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Compute x W^T: (..., in) contiguous, of the dtype that the loop takes -> (..., out) in `dtype`, else fp32."""
        import torch

        outputs, inputs = self.shape
        result = torch.empty(*x.shape[:-1], outputs, dtype=dtype or torch.float32)
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
