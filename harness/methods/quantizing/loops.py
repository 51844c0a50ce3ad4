"""The loops of `fused`, compiled by Numba at their first call; imported where `compute=fused` is asked for.

Rows of the weight are shared out between threads, so that no figure depends on how many there are. Sums may be taken
in any order, which lets them run in vector registers: the order is that of the processor's width. What unpacks is
without that leave, so that it rounds as the method does. All that a loop calls stands in this file: Numba's cache sees
a change only in the file of the loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from harness.core.files import cache_dir

# beside converted checkpoints, unless NUMBA_CACHE_DIR says where: this file's own folder may be read-only
numba.config.CACHE_DIR = numba.config.CACHE_DIR or str(cache_dir() / "numba")

SUMS = {"reassoc", "contract"}  # LLVM's fast-math flags that sums need; without the others not a number stays so
REGISTERS = "+avx2" in cpu_target.target_context.codegen().magic_tuple()[2]  # whether levels are looked up in them
CODES = 32  # looked up at a time
PSHUFB = "llvm.x86.avx2.pshuf.b"  # 32 lookups in a table of 16 bytes, one a lane
FIRST_FOURS, LAST_FOURS = (0, 1, 4, 5, 8, 9, 12, 13), (2, 3, 6, 7, 10, 11, 14, 15)  # bytes with those of eight codes
BYTE, INDEX = ir.IntType(8), ir.IntType(32)
PAIRS, FLOATS = ir.VectorType(ir.IntType(16), 16), ir.VectorType(ir.FloatType(), 8)
Array = np.ndarray[Any, Any]
Weight = tuple[Any, ...]
Loop = TypeVar("Loop", bound=Callable[..., Any])
_running = threading.local()


def compiled(**options: Any) -> Callable[[Loop], Loop]:
    """Numba's `njit`, which says no types, and takes no loop that it may keep where no folder can be written."""

    def decorator(loop: Loop) -> Loop:
        try:
            made: Loop = njit(**options)(loop)
        except RuntimeError:  # then it is compiled in every process
            made = njit(**options | {"cache": False})(loop)
        return made

    return decorator


def threads(wanted: int) -> int:
    """Have as many threads run the loops, of those Numba started with: how many they are."""
    found: int = max(1, min(wanted, numba.config.NUMBA_NUM_THREADS))
    if getattr(_running, "threads", None) != found:  # a token's 200 products would feel the call
        before = torch.get_num_threads()
        numba.set_num_threads(found)
        torch.set_num_threads(before)  # Numba's first launch sets OpenMP's number for torch too, to every core
        _running.threads = found
    return found


@compiled(nogil=True, fastmath=SUMS, cache=True)
def int8(x: Array, weight: Weight, found: Array, start: int, stop: int) -> None:
    """Outputs from start to stop of x (M * in,) fp32 into found (M * out,) fp32.

    weight: codes (out, in) int8, scale and zero point, each (out,), or (1,) for all, fp32.
    """
    codes, scale, zero = weight
    outputs, inputs = codes.shape
    wide, sums = x.reshape(-1, inputs), found.reshape(-1, outputs)
    for i in range(start, stop):
        row, step, offset = codes[i], scale[min(i, len(scale) - 1)], zero[min(i, len(zero) - 1)]
        for m in range(len(wide)):
            total = np.float32(0)
            for j in range(inputs):
                total += wide[m, j] * (np.float32(row[j]) - offset)
            sums[m, i] = total * step


@compiled(nogil=True, cache=True)
def unpack_int8(weight: Weight, first: int, found: Array, start: int, stop: int) -> None:
    """Rows from start to stop of found (rows * in,) fp32, which holds the weight's from `first` on, as dequantized."""
    codes, scale, zero = weight
    rows = found.reshape(-1, codes.shape[1])
    for i in range(start, stop):
        step, offset = scale[min(first + i, len(scale) - 1)], zero[min(first + i, len(zero) - 1)]
        for j in range(rows.shape[1]):
            rows[i, j] = (np.float32(codes[first + i, j]) - offset) * step


@compiled(nogil=True, fastmath=SUMS, cache=True)
def int4(x: Array, weight: Weight, found: Array, start: int, stop: int) -> None:
    """Outputs from start to stop of x (M * in,) fp32 into found (M * out,) fp32.

    weight: codes (out * in / 2,) uint8, with what belongs to a block: scale (out * in / block,) and, where there is a
    least level, least alike, else (0,), fp32; levels (16,) fp32, and planes (64,) uint8, their first bytes, then their
    second, third and fourth; in.
    """
    codes, inputs = weight[0], weight[5]
    wide, sums = x.reshape(-1, inputs), found.reshape(-1, 2 * len(codes) // inputs)
    row = np.empty(inputs, np.float32)
    for i in range(start, stop):
        _row_of_int4(weight, i, row)
        for m in range(len(wide)):
            total = np.float32(0)
            for j in range(inputs):
                total += wide[m, j] * row[j]
            sums[m, i] = total


@compiled(nogil=True, cache=True)
def unpack_int4(weight: Weight, first: int, found: Array, start: int, stop: int) -> None:
    """Rows from start to stop of found (rows * in,) fp32, which holds the weight's from `first` on, as dequantized."""
    rows = found.reshape(-1, weight[5])
    for i in range(start, stop):
        _row_of_int4(weight, first + i, rows[i])


@compiled(inline="always")
def _share(rows: int, thread: int, threads: int) -> tuple[int, int]:
    """Rows from one to another that a thread takes."""
    each = (rows + threads - 1) // threads
    return min(rows, thread * each), min(rows, (thread + 1) * each)


@compiled(parallel=True, nogil=True, cache=True)
def int8_shared(x: Array, weight: Weight, found: Array, rows: int, threads: int) -> None:
    """`int8`, shared out."""
    for thread in prange(threads):
        start, stop = _share(rows, thread, threads)
        int8(x, weight, found, start, stop)


@compiled(parallel=True, nogil=True, cache=True)
def unpack_int8_shared(weight: Weight, first: int, found: Array, rows: int, threads: int) -> None:
    """`unpack_int8`, shared out."""
    for thread in prange(threads):
        start, stop = _share(rows, thread, threads)
        unpack_int8(weight, first, found, start, stop)


@compiled(parallel=True, nogil=True, cache=True)
def int4_shared(x: Array, weight: Weight, found: Array, rows: int, threads: int) -> None:
    """`int4`, shared out."""
    for thread in prange(threads):
        start, stop = _share(rows, thread, threads)
        int4(x, weight, found, start, stop)


@compiled(parallel=True, nogil=True, cache=True)
def unpack_int4_shared(weight: Weight, first: int, found: Array, rows: int, threads: int) -> None:
    """`unpack_int4`, shared out."""
    for thread in prange(threads):
        start, stop = _share(rows, thread, threads)
        unpack_int4(weight, first, found, start, stop)


@compiled(inline="always")
def _row_of_int4(weight: Weight, i: int, row: Array) -> None:
    """Row i of the weight into row (in,): level * scale (+ least), two roundings."""
    codes, scale, least, levels, planes, inputs = weight
    block = 2 * len(codes) // len(scale)
    blocks = inputs // block
    for b in range(blocks):
        first = (i * blocks + b) * block // 2
        _scaled(codes, first, levels, planes, scale[i * blocks + b], row, b * block, block)
    if len(least) > 0:
        for b in range(blocks):
            part, lowest = row[b * block : (b + 1) * block], least[i * blocks + b]
            for j in range(block):
                part[j] += lowest


@compiled(inline="always")
def _scaled_by_table(
    codes: Array, first: int, levels: Array, planes: Array, scale: float, found: Array, at: int, count: int
) -> None:
    """Levels of `count` codes from byte `first` on, times a scale, into found from `at` on, one after another."""
    for j in range(count // 2):
        byte = codes[first + j]
        found[at + 2 * j] = levels[np.uintp(byte >> 4)] * scale
        found[at + 2 * j + 1] = levels[np.uintp(byte & 15)] * scale


@compiled(inline="always")
def _scaled_in_registers(
    codes: Array, first: int, levels: Array, planes: Array, scale: float, found: Array, at: int, count: int
) -> None:
    """The same, to the same bits, CODES at a time."""
    whole = count - count % CODES
    for j in range(0, whole, CODES):
        _levels_in_registers(codes, first + j // 2, planes, scale, found, at + j)
    _scaled_by_table(codes, first + whole // 2, levels, planes, scale, found, at + whole, count - whole)


_scaled = _scaled_in_registers if REGISTERS else _scaled_by_table


@intrinsic  # type: ignore[untyped-decorator]
def _levels_in_registers(
    context: Any, codes: Any, first: Any, planes: Any, scale: Any, found: Any, at: Any
) -> tuple[Any, Any]:
    """CODES levels from byte `first` on, times a scale: one shuffle looks up a byte of them all, four their floats.

    The first four of each eight codes go to the lower lane of a register and the last four to the upper, so that bytes
    make floats, and floats stand in their order, within the lanes.
    """

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        def place(array: int, index: Any, kind: Any) -> Any:
            data = target.make_array(signature.args[array])(target, builder, given[array]).data
            return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())

        codes, first, planes, scale, found, at = range(6)
        packed = builder.load(place(codes, given[first], ir.VectorType(BYTE, 16)), align=1)
        packed = builder.shuffle_vector(packed, packed, _constant(INDEX, (*FIRST_FOURS, *LAST_FOURS)))
        nibbles = builder.lshr(packed, _constant(BYTE, [4] * 16)), builder.and_(packed, _constant(BYTE, [15] * 16))
        wanted = builder.shuffle_vector(*nibbles, _constant(INDEX, _in_turn(16, 0, 16)))
        tables = ir.VectorType(BYTE, CODES)
        lookup = builder.module.declare_intrinsic(PSHUFB, fnty=ir.FunctionType(tables, [tables, tables]))
        looked = []
        for plane in range(4):
            start = ir.Constant(ir.IntType(64), 16 * plane)
            table = builder.load(place(planes, start, ir.VectorType(BYTE, 16)), align=1)
            both = builder.shuffle_vector(table, table, _constant(INDEX, [*range(16)] * 2))
            looked.append(builder.call(lookup, [both, wanted]))
        lower, upper = (_woven(builder, looked[k], looked[k + 1], PAIRS) for k in (0, 2))
        parts = [part for low, high in zip(lower, upper, strict=True) for part in _woven(builder, low, high, FLOATS)]
        one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), given[scale], ir.Constant(INDEX, 0))
        steps = builder.shuffle_vector(one, one, _constant(INDEX, [0] * 8))
        to = place(found, given[at], FLOATS)
        for k, part in enumerate(parts):
            builder.store(builder.fmul(part, steps), builder.gep(to, [ir.Constant(INDEX, k)]), align=4)
        return target.get_dummy_value()

    return types.void(codes, first, planes, scale, found, at), generate


def _constant(element: Any, values: Sequence[int]) -> Any:
    return ir.Constant(ir.VectorType(element, len(values)), [ir.Constant(element, value) for value in values])


def _in_turn(count: int, start: int, stop: int) -> list[int]:
    """Elements from start to stop of two vectors of `count`, one of each in turn, as a shuffle's mask."""
    return [at + vector for at in range(start, stop) for vector in (0, count)]


def _woven(builder: Any, left: Any, right: Any, kind: Any) -> list[Any]:
    """The lower and the upper half of both lanes of two vectors, elements in turn, as vectors of a kind."""
    count: int = left.type.count
    lane, half = count // 2, count // 4
    masks = (_in_turn(count, at, at + half) + _in_turn(count, lane + at, lane + at + half) for at in (0, half))
    return [builder.bitcast(builder.shuffle_vector(left, right, _constant(INDEX, mask)), kind) for mask in masks]
