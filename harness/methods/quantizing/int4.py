"""Blocks of 4-bit codes, two to a byte, over the flattened row-major weight (out, in), as in bitsandbytes.

A code stands for one of 16 levels, of a table or in equal steps, W = levels[code] scale (+ minimum); the last block may
be partial. Everything works on the meta device too, so that sizes are predicted by the code that makes them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.core.contracts import Parameter
from harness.methods.quantizing import compiled
from harness.methods.quantizing.codes import COMPUTE_OR_FUSED, Codes, divide
from harness.methods.quantizing.compiled import Loops, Rounding, loop

if TYPE_CHECKING:  # annotations only: methods are listed without torch
    from torch import Tensor

# 64: the block of QLoRA and bitsandbytes; powers of two, so that a block never splits a byte
BLOCK = Parameter(int, 64, "weights that share a scale", choices=(16, 32, 64, 128, 256, 512, 1024, 2048, 4096))
CODES = 32  # looked up at a time
PSHUFB = "llvm.x86.avx2.pshuf.b"  # 32 lookups in a table of 16 bytes, one a lane
FIRST_FOURS, LAST_FOURS = (0, 1, 4, 5, 8, 9, 12, 13), (2, 3, 6, 7, 10, 11, 14, 15)  # bytes with those of eight codes
MAGNITUDE = np.uint32(0x7FFFFFFF)  # of a float's bits: all but the sign
Array = np.ndarray[Any, Any]
Weight = tuple[Any, ...]
prange: Any = range  # Numba's, where loops are compiled


class Blocks4(Codes):
    """Codes (ceil(n / 2),) uint8 of the nearest of 16 levels in [-1, 1], scale (ceil(n / block),) fp32: the absmax.

    Args:
        levels: in the order of their codes; stored once a model.
    """

    grain = "block"
    compute = COMPUTE_OR_FUSED
    uses_numba = True

    def __init__(self, levels: tuple[float, ...]) -> None:
        self.levels = levels
        self.parameters = {"block": BLOCK}
        self.tables = {"levels": levels}

    def encode(self, weight: Tensor, block: int, **values: Any) -> dict[str, Tensor]:
        """(out, in) fp32, n elements -> codes and scale."""
        rows = blocks(weight, block)  # (blocks, block)
        scale = rows.abs().amax(dim=1)  # (blocks,)
        codes = nearest(divide(rows, scale[:, None]), self.levels)
        return {"codes": pack(codes, weight.numel()), "scale": scale}

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], block: int, **values: Any) -> Tensor:
        """(out, in) fp32."""
        whole = unpack(stored["codes"], self.level_tensor(stored), shape[0] * shape[1])
        return rescale(whole, block, stored["scale"], stored.get("minimum")).view(shape)

    def level_tensor(self, stored: Mapping[str, Tensor]) -> Tensor:
        """(16,) fp32, where the codes lie."""
        return stored["levels"]

    def loops(self, stored: Mapping[str, Tensor], shape: tuple[int, int], block: int, **values: Any) -> Loops | None:
        """None where blocks do not divide a row, or cut a byte."""
        if not _fits(shape, block):
            return None
        scale = stored["scale"].numpy()
        least = stored["minimum"].numpy() if "minimum" in stored else scale[:0]
        table = np.array(self.levels, dtype=np.float32)
        planes = np.ascontiguousarray(table.view(np.uint8).reshape(16, 4).T).reshape(-1)
        weight = stored["codes"].numpy(), scale, least, table, planes, shape[1]
        return Loops(weight, shape, (_multiply, _multiply_shared), (_unpack, _unpack_shared))

    def rounding(self, shape: tuple[int, int], block: int, **values: Any) -> Rounding | None:
        """None where blocks do not divide a row, or cut a byte."""
        if not _fits(shape, block):
            return None
        order = sorted(range(len(self.levels)), key=self.levels.__getitem__)
        ascending = np.array([self.levels[code] for code in order], dtype=np.float32)
        tables = (ascending[:-1] + ascending[1:]) / np.float32(2), np.array(order, dtype=np.uint8)
        return Rounding(_room(shape, block), block, lambda bits, *result: _round_to_levels(bits, *tables, *result))


class Steps4(Blocks4):
    """Levels in equal steps around 0: scale max|w| / 7, codes round(w / scale) + 8, of -7..7, ties to even.

    The code of -8 stays unused, so that the grid is symmetric.
    """

    first = -8  # the level of code 0

    def __init__(self) -> None:
        super().__init__(tuple(float(self.first + code) for code in range(16)))
        self.tables = {}

    def encode(self, weight: Tensor, block: int, **values: Any) -> dict[str, Tensor]:
        """(out, in) fp32, n elements -> codes and scale."""
        rows = blocks(weight, block)  # (blocks, block)
        scale = rows.abs().amax(dim=1) / 7
        codes = divide(rows, scale[:, None]).round_().clamp_(-7, 7).add_(8).byte()
        return {"codes": pack(codes, weight.numel()), "scale": scale}

    def level_tensor(self, stored: Mapping[str, Tensor]) -> Tensor:
        """(16,) fp32, made where the codes lie: a card copies nothing."""
        import torch

        return torch.arange(float(self.first), self.first + 16.0, device=stored["codes"].device)

    def rounding(self, shape: tuple[int, int], block: int, **values: Any) -> Rounding | None:
        """None where blocks do not divide a row, or cut a byte."""
        return Rounding(_room(shape, block), block, _round_to_steps) if _fits(shape, block) else None


class AffineSteps4(Steps4):
    """Levels in equal steps from a block's minimum, fp32: scale (max - min) / 15, codes round((w - min) / scale)."""

    first = 0

    def encode(self, weight: Tensor, block: int, **values: Any) -> dict[str, Tensor]:
        """(out, in) fp32, n elements -> codes, scale and minimum (ceil(n / block),) fp32."""
        rows = blocks(weight, block)  # (blocks, block)
        minimum = rows.amin(dim=1)
        scale = (rows.amax(dim=1) - minimum) / 15  # 0 in a constant block, whose codes are 0 then
        codes = divide(rows - minimum[:, None], scale[:, None]).round_().clamp_(0, 15).byte()
        return {"codes": pack(codes, weight.numel()), "scale": scale, "minimum": minimum}

    def rounding(self, shape: tuple[int, int], block: int, **values: Any) -> Rounding | None:
        """None: torch makes them."""
        return None


def _fits(shape: tuple[int, int], block: int) -> bool:
    """Whether there are loops for the shape: blocks divide a row and cut no byte. Then they are compiled."""
    if shape[1] % block or block % 2 or not compiled.available():
        return False
    compiled.compile_loops(__name__, _in_registers)
    return True


def _room(shape: tuple[int, int], block: int) -> dict[str, Tensor]:
    import torch

    count = shape[0] * shape[1]
    return {"codes": torch.empty(count // 2, dtype=torch.uint8), "scale": torch.empty(count // block)}


def blocks(weight: Tensor, block: int) -> Tensor:
    """Cut a weight into rows of `block`; the last value fills up a partial block, which moves no extremum.

    Args:
        weight: any shape, n elements.
        block: weights a block.

    Returns:
        (ceil(n / block), block), a view where n divides.
    """
    import torch

    flat = weight.reshape(-1)
    missing = -flat.numel() % block
    if missing:
        flat = torch.cat((flat, flat[-1:].expand(missing)))
    return flat.view(-1, block)


def pack(codes: Tensor, count: int) -> Tensor:
    """Pack 4-bit codes two to a byte, the first in the high nibble (bitsandbytes' order).

    Args:
        codes: uint8, values 0..15, at least `count` of them; what lies behind is filling and is dropped.
        count: codes to keep; an odd one leaves the last low nibble 0.

    Returns:
        (ceil(count / 2),) uint8.
    """
    import torch

    flat = codes.reshape(-1)[:count]
    if count % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    return (flat[0::2] << 4) | flat[1::2]


def unpack(packed: Tensor, levels: Tensor, count: int) -> Tensor:
    """Look up the level of each 4-bit code: (ceil(count / 2),) uint8, (16,) fp32 -> (count,) fp32, freshly allocated.

    Levels travel in one element as wide as several: four of two bytes where the count allows, else two of one byte.
    Gathering rows of floats, or splitting the nibbles first, takes several times as long on a CPU.
    """
    import torch

    if packed.device.type == "cpu" and count % 4 == 0:
        wide = _quads(tuple(levels.tolist())).index_select(0, packed.view(torch.uint16).int())  # (count / 4,)
        return torch.view_as_real(wide).view(torch.float32).view(-1)
    chosen = _pairs(levels).view(torch.int64).view(-1).index_select(0, packed.int())  # (ceil(count / 2),)
    return chosen.view(torch.float32)[:count]


def _pairs(levels: Tensor) -> Tensor:
    """Both levels of every byte: (16,) -> (256, 2), the high nibble's first."""
    import torch

    return torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)


@functools.lru_cache(maxsize=16)  # a megabyte each, one a table of levels
def _quads(levels: tuple[float, ...]) -> Tensor:
    """All four levels of every two bytes, as 16 bytes of complex128: (65536,), in the order of the bytes in memory."""
    import torch

    with torch.inference_mode(False):
        both = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(-1, 2).long()
        four = _pairs(torch.tensor(levels, dtype=torch.float32))[both].view(-1, 4)  # (65536, 4)
        return torch.view_as_complex(four.view(torch.float64))


def rescale(values: Tensor, block: int, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
    """Compute values * scale (+ minimum), block by block and in place.

    Args:
        values: (n,) fp32.
        block: values that share a scale.
        scale: (ceil(n / block),) fp32.
        minimum: the same shape, or None for 0.

    Returns:
        `values`.
    """
    whole = values.numel() // block
    head = values[: whole * block].view(whole, block)
    tail = values[whole * block :]
    head.mul_(scale[:whole, None])
    tail.mul_(scale[whole:])  # (0,) * (0,) where n divides
    if minimum is not None:
        head.add_(minimum[:whole, None])
        tail.add_(minimum[whole:])
    return values


def nearest(values: Tensor, levels: Sequence[float]) -> Tensor:
    """Code of the level nearest to each value: the number of midpoints below it, put in the table's own order.

    A value on a midpoint takes the lower level. Where a table spells 0 twice (FP4: codes 0 and 8), values at or just
    under 0 take the first spelling and values just above it the second; both stand for 0.

    Args:
        values: fp32, any shape.
        levels: 16 levels in the order of their codes.

    Returns:
        uint8 codes, same shape.
    """
    import torch

    order = sorted(range(len(levels)), key=levels.__getitem__)
    ascending = torch.tensor([levels[code] for code in order], dtype=torch.float32)  # (16,)
    midpoints = (ascending[:-1] + ascending[1:]) / 2  # (15,)
    if values.is_cuda:  # one kernel instead of thirty
        rank = torch.bucketize(values, midpoints.to(values.device), out_int32=True)
    else:
        rank, above = torch.zeros_like(values), torch.empty_like(values)
        for midpoint in midpoints.tolist():  # six times as fast as bucketize, which searches one value after another
            rank += torch.gt(values, midpoint, out=above)
    if order == sorted(order):
        return rank.byte()
    codes = torch.tensor(order, dtype=torch.uint8, device=values.device)
    return codes.index_select(0, rank.view(-1).int()).view(rank.shape)


@loop(nogil=True, fastmath=compiled.SUMS, cache=True)
def _multiply(x: Array, weight: Weight, result: Array, start: int, stop: int) -> None:
    """Outputs from start to stop of x (M * in,) fp32 into result (M * out,) fp32.

    weight: codes (out * in / 2,) uint8, with what belongs to a block: scale (out * in / block,) and, where there is a
    least level, least alike, else (0,), fp32; levels (16,) fp32, and planes (64,) uint8, their first bytes, then their
    second, third and fourth; in.
    """
    codes, inputs = weight[0], weight[5]
    wide, sums = x.reshape(-1, inputs), result.reshape(-1, 2 * len(codes) // inputs)
    row = np.empty(inputs, np.float32)
    for i in range(start, stop):
        _row(weight, i, row)
        for m in range(len(wide)):
            total = np.float32(0)
            for j in range(inputs):
                total += wide[m, j] * row[j]
            sums[m, i] = total


@loop(nogil=True, cache=True)
def _unpack(weight: Weight, first: int, result: Array, start: int, stop: int) -> None:
    """Rows from start to stop of result (rows * in,) fp32, which holds the weight's from `first` on, as dequantized."""
    rows = result.reshape(-1, weight[5])
    for i in range(start, stop):
        _row(weight, first + i, rows[i])


@loop(parallel=True, nogil=True, cache=True)
def _multiply_shared(x: Array, weight: Weight, result: Array, rows: int, threads: int) -> None:
    """`_multiply`, shared out."""
    each = (rows + threads - 1) // threads
    for thread in prange(threads):
        _multiply(x, weight, result, min(rows, thread * each), min(rows, (thread + 1) * each))


@loop(parallel=True, nogil=True, cache=True)
def _unpack_shared(weight: Weight, first: int, result: Array, rows: int, threads: int) -> None:
    """`_unpack`, shared out."""
    each = (rows + threads - 1) // threads
    for thread in prange(threads):
        _unpack(weight, first, result, min(rows, thread * each), min(rows, (thread + 1) * each))


@loop(inline="always")
def _row(weight: Weight, i: int, row: Array) -> None:
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


@loop(inline="always")
def _scaled_by_table(
    codes: Array, first: int, levels: Array, planes: Array, scale: float, result: Array, at: int, count: int
) -> None:
    """Levels of `count` codes from byte `first` on, times a scale, into result from `at` on, one after another."""
    for j in range(count // 2):
        byte = codes[first + j]
        result[at + 2 * j] = levels[np.uintp(byte >> 4)] * scale
        result[at + 2 * j + 1] = levels[np.uintp(byte & 15)] * scale


@loop(inline="always")
def _scaled_in_registers(
    codes: Array, first: int, levels: Array, planes: Array, scale: float, result: Array, at: int, count: int
) -> None:
    """The same, to the same bits, CODES at a time."""
    whole = count - count % CODES
    for j in range(0, whole, CODES):
        _levels_in_registers(codes, first + j // 2, planes, scale, result, at + j)
    _scaled_by_table(codes, first + whole // 2, levels, planes, scale, result, at + whole, count - whole)


_scaled = _scaled_by_table
_levels_in_registers: Any = None  # and `_scaled`: see `_in_registers`


@loop(inline="always")
def _unpacked(bits: Array, row: Array, scale: Array, i: int, most: float) -> Any:
    """Write the floats of bits to row and max|row| / most to scale[i]; gives what to divide by: that, or 1 for 0.

    The absmax is taken of bits as whole numbers: their order is the same, and a NaN is the largest.
    """
    whole, largest, shift = row.view(np.uint32), np.uint32(0), np.uint32(32 - 8 * bits.itemsize)
    for j in range(len(bits)):
        whole[j] = np.uint32(bits[j]) << shift
        largest = max(largest, whole[j] & MAGNITUDE)
    scale.view(np.uint32)[i] = largest
    scale[i] /= np.float32(most)
    return scale[i] if scale[i] != 0 else np.float32(1)


@loop(nogil=True, cache=True)
def _round_to_steps(bits: Array, codes: Array, scale: Array) -> None:
    """Symmetric int4: bits (blocks, block) -> codes (blocks, block / 2) uint8, scale (blocks,) fp32."""
    row, whole = np.empty(bits.shape[1], np.float32), np.empty(bits.shape[1], np.uint8)
    for i in range(len(bits)):
        result, step = codes[i], _unpacked(bits[i], row, scale, i, 7)
        for j in range(len(row)):
            whole[j] = min(max(np.int32(np.rint(row[j] / step) + 8), 1), 15)
        for j in range(len(result)):
            result[j] = whole[2 * j] << 4 | whole[2 * j + 1]


@loop(nogil=True, cache=True)
def _round_to_levels(bits: Array, midpoints: Array, order: Array, codes: Array, scale: Array) -> None:
    """The nearest levels: bits (blocks, block) -> codes (blocks, block / 2) uint8, scale (blocks,) fp32.

    midpoints: (15,) fp32, ascending; order: (16,) uint8, the code of each rank.
    """
    row, ranks = np.empty(bits.shape[1], np.float32), np.empty(bits.shape[1], np.int32)
    for i in range(len(bits)):
        result, step = codes[i], _unpacked(bits[i], row, scale, i, 1)
        for j in range(len(row)):
            ranks[j], row[j] = 0, row[j] / step
        for k in range(len(midpoints)):
            midpoint = midpoints[k]
            for j in range(len(row)):
                ranks[j] += row[j] > midpoint
        for j in range(len(result)):
            result[j] = order[ranks[2 * j]] << 4 | order[ranks[2 * j + 1]]


def _in_registers() -> dict[str, Any]:
    """What takes the table's place on processors with AVX2."""
    from llvmlite import ir
    from numba import types
    from numba.core.registry import cpu_target
    from numba.extending import intrinsic

    if "+avx2" not in cpu_target.target_context.codegen().magic_tuple()[2]:
        return {}
    byte, index = ir.IntType(8), ir.IntType(32)
    pairs, floats = ir.VectorType(ir.IntType(16), 16), ir.VectorType(ir.FloatType(), 8)

    def constant(element: Any, values: Sequence[int]) -> Any:
        return ir.Constant(ir.VectorType(element, len(values)), [ir.Constant(element, value) for value in values])

    def alternating(count: int, start: int, stop: int) -> list[int]:
        """Elements from start to stop of two vectors of `count`, one of each in turn, as a shuffle's mask."""
        return [at + vector for at in range(start, stop) for vector in (0, count)]

    def woven(builder: Any, left: Any, right: Any, kind: Any) -> list[Any]:
        """The lower and the upper half of both lanes of two vectors, elements in turn, as vectors of a kind."""
        count: int = left.type.count
        lane, half = count // 2, count // 4
        masks = (
            alternating(count, at, at + half) + alternating(count, lane + at, lane + at + half) for at in (0, half)
        )
        return [builder.bitcast(builder.shuffle_vector(left, right, constant(index, mask)), kind) for mask in masks]

    @intrinsic  # type: ignore[untyped-decorator]
    def levels_in_registers(
        context: Any, codes: Any, first: Any, planes: Any, scale: Any, result: Any, at: Any
    ) -> tuple[Any, Any]:
        """CODES levels from byte `first` on, times a scale: one shuffle looks up a byte of them all, four their floats.

        The first four of each eight codes go to the lower lane of a register and the last four to the upper, so that
        bytes make floats, and floats stand in their order, within the lanes.
        """

        def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
            def place(array: int, index: Any, kind: Any) -> Any:
                data = target.make_array(signature.args[array])(target, builder, given[array]).data
                return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())

            codes, first, planes, scale, result, at = range(6)
            packed = builder.load(place(codes, given[first], ir.VectorType(byte, 16)), align=1)
            packed = builder.shuffle_vector(packed, packed, constant(index, (*FIRST_FOURS, *LAST_FOURS)))
            nibbles = builder.lshr(packed, constant(byte, [4] * 16)), builder.and_(packed, constant(byte, [15] * 16))
            wanted = builder.shuffle_vector(*nibbles, constant(index, alternating(16, 0, 16)))
            tables = ir.VectorType(byte, CODES)
            lookup = builder.module.declare_intrinsic(PSHUFB, fnty=ir.FunctionType(tables, [tables, tables]))
            looked = []
            for plane in range(4):
                start = ir.Constant(ir.IntType(64), 16 * plane)
                table = builder.load(place(planes, start, ir.VectorType(byte, 16)), align=1)
                both = builder.shuffle_vector(table, table, constant(index, [*range(16)] * 2))
                looked.append(builder.call(lookup, [both, wanted]))
            lower, upper = (woven(builder, looked[k], looked[k + 1], pairs) for k in (0, 2))
            parts = [part for low, high in zip(lower, upper, strict=True) for part in woven(builder, low, high, floats)]
            one = builder.insert_element(ir.Constant(floats, ir.Undefined), given[scale], ir.Constant(index, 0))
            steps = builder.shuffle_vector(one, one, constant(index, [0] * 8))
            to = place(result, given[at], floats)
            for k, part in enumerate(parts):
                builder.store(builder.fmul(part, steps), builder.gep(to, [ir.Constant(index, k)]), align=4)
            return target.get_dummy_value()

        return types.void(codes, first, planes, scale, result, at), generate

    return {"_levels_in_registers": levels_in_registers, "_scaled": _scaled_in_registers}
