"""Rows of int8 codes: W = (codes - zero point) scale, with one scale for all or one an output channel.

An int8 code is a whole number below 2^8, so bf16 holds it exactly, and a product of bf16 matrices sums in fp32: what
is rounded is the activation, and each sum once, to 8 bits of significand. Where activations are in bf16, processors
without bf16 products in tiles (AMX) keep the dequantized weight: there the detour is slower, and figures recorded there
stay what they are. `compute=bf16` asks for these roundings on every processor, whatever the activations are in; up
to eight rows of fp32 go by loops then, which round activations alone, where there is Numba and no AMX.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.core.contracts import Parameter
from harness.methods.quantizing import compiled
from harness.methods.quantizing.codes import BF16, COMPUTE_OR_FUSED, Codes, divide
from harness.methods.quantizing.compiled import Loops, Rounding, loop

if TYPE_CHECKING:  # annotations only: methods are listed without torch
    from torch import Tensor

    from harness.methods.quantizing.stored import StoredWeight

TINY = 2.0**-126  # smallest normal fp32: a row of zeros keeps its zeros
STEP = 16  # channels that torch 2.13's kernel reads at a time: where they do not divide `in`, it reads past the row
TURING = (7, 5)  # the first CUDA devices with int8 products in tensor cores; torch._int_mm asks for more than 16 rows
MAGNITUDE = np.uint32(0x7FFFFFFF)  # of a float's bits: all but the sign
Array = np.ndarray[Any, Any]
Weight = tuple[Array, Array, Array]
prange: Any = range  # Numba's, where loops are compiled


class Rows8(Codes):
    """Symmetric rows: scale (out, 1) = max|w| / 127, codes (out, in) = round(w / scale) in -127..127, ties to even."""

    grain = "row"
    compute: Parameter | None = COMPUTE_OR_FUSED
    uses_numba = True

    def encode(self, weight: Tensor, **values: Any) -> dict[str, Tensor]:
        """(out, in) fp32 -> codes (out, in) int8, scale fp32."""
        scale = self.absmax(weight) / 127
        return {"codes": divide(weight, scale).round_().clamp_(-127, 127).char(), "scale": scale}

    def absmax(self, weight: Tensor) -> Tensor:
        """(out, 1)."""
        return weight.abs().amax(dim=1, keepdim=True)

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], **values: Any) -> Tensor:
        """(out, in) fp32."""
        return stored["codes"].float().mul_(stored["scale"])

    def multiply(self, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor | None:
        """In bf16 with the codes as they lie, where that is asked for or quick; few rows rather by the loops."""
        from harness.methods.quantizing import products

        asked = weight.recipe.compute == BF16
        by_loops = products.by_loops(x, weight) and not (asked and products.tiled(x))  # torch has a kernel for tiles
        if not by_loops and (asked or products.quick(x)):
            return in_bf16(x, weight.get_buffer("codes"), weight.get_buffer("scale"), bias)
        return None

    def rounding(self, shape: tuple[int, int], **values: Any) -> Rounding | None:
        """One row after another."""
        import torch

        if not compiled.available():
            return None
        compiled.compile_loops(__name__)
        result = {"codes": torch.empty(shape, dtype=torch.int8), "scale": torch.empty(shape[0], 1)}
        return Rounding(result, shape[1], _round)

    def loops(self, stored: Mapping[str, Tensor], shape: tuple[int, int], **values: Any) -> Loops | None:
        """In products the scale comes behind the sum of a row."""
        if not compiled.available():
            return None
        compiled.compile_loops(__name__)
        zero = stored["zero_point"].numpy() if "zero_point" in stored else np.zeros(1, dtype=np.float32)
        weight = stored["codes"].numpy(), stored["scale"].numpy().reshape(-1), zero.reshape(-1)
        return Loops(weight, shape, (_multiply, _multiply_shared), (_unpack, _unpack_shared))


class Tensor8(Rows8):
    """One scale () for the whole weight."""

    grain = ""

    def absmax(self, weight: Tensor) -> Tensor:
        """()."""
        return weight.abs().amax()

    def rounding(self, shape: tuple[int, int], **values: Any) -> Rounding | None:
        """None: the scale is known behind the last row."""
        return None


class ZeroPoints8(Rows8):
    """Rows with a zero point (out, 1), a whole number in fp32: scale (max - min) / 255, codes in -128..127.

    zero_point = -128 - round(min / scale), codes = round(w / scale) + zero_point. A constant row c has no spread: its
    scale is |c|, which makes it exact.
    """

    def encode(self, weight: Tensor, **values: Any) -> dict[str, Tensor]:
        """(out, in) fp32 -> codes (out, in) int8, scale and zero_point (out, 1) fp32."""
        minimum = weight.amin(dim=1, keepdim=True)
        step = (weight.amax(dim=1, keepdim=True) - minimum) / 255
        step = step.where(step != 0, minimum.abs())  # (out, 1)
        zero_point = -128 - divide(minimum, step).round_()
        codes = divide(weight, step).round_().add_(zero_point).clamp_(-128, 127).char()
        return {"codes": codes, "scale": step, "zero_point": zero_point}

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], **values: Any) -> Tensor:
        """(out, in) fp32."""
        return stored["codes"].float().sub_(stored["zero_point"]).mul_(stored["scale"])

    def multiply(self, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> None:
        """None: codes less their zero point may be larger than bf16 holds."""

    def rounding(self, shape: tuple[int, int], **values: Any) -> Rounding | None:
        """None: torch makes them."""
        return None


class Rows8By8(Rows8):
    """Symmetric rows, multiplied by activations that are rounded to int8 too: one scale a token."""

    compute = None
    rounds = True

    def multiply(self, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
        """Sums of whole numbers."""
        return in_int8(x, weight.get_buffer("codes"), weight.get_buffer("scale"), bias)

    def loops(self, stored: Mapping[str, Tensor], shape: tuple[int, int], **values: Any) -> Loops | None:
        """None: nothing is multiplied in fp32."""
        return None


def preload() -> None:
    """Have Numba set itself up, half a second, which processes that are forked later find done. Starts no thread."""
    if compiled.available():
        compiled.compile_loops(__name__)
        one = np.ones(1, dtype=np.float32)
        _multiply(one, (np.ones((1, 1), dtype=np.int8), one, one), one.copy(), 0, 1)


@functools.lru_cache(maxsize=64)  # widths that a model has: some bytes each
def _ones(count: int) -> Tensor:
    import torch

    with torch.inference_mode(False):
        return torch.ones(count, dtype=torch.bfloat16)


def in_bf16(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x (codes scale)^T + bias with activations in bf16: quick where products in tiles are.

    Args:
        x: (..., in), rounded to bf16.
        codes: (out, in) int8.
        scale: fp32, one for all or one an output channel.
        bias: (out,) or None.

    Returns:
        (..., out) in x's dtype.
    """
    import torch

    from harness.methods.quantizing import products

    outputs, inputs = codes.shape
    rows = x.reshape(-1, inputs).bfloat16()  # (M, in)
    if rows.shape[0] <= products.FEW_ROWS and inputs % STEP == 0 and products.tiled(x):
        sums = torch._weight_int8pack_mm(rows, codes, _ones(outputs))  # (M, out) bf16: the scale comes after, in fp32
    else:
        sums = products.rounded(rows, codes.bfloat16())  # (M, out) bf16
    return products.finished(x, torch.mul(sums, scale.view(-1)), bias)  # (M, out) fp32


def multiplies_int8(rows: Tensor, codes: Tensor) -> bool:
    """Whether `torch._int_mm` takes rows (M, in) and codes (out, in) where they lie, in hardware."""
    import torch

    from harness.methods.quantizing import cpu

    if not rows.is_cuda:
        return bool(cpu.cpu_flags() & cpu.INT8_FLAGS)
    (count, inputs), outputs = rows.shape, len(codes)
    return torch.cuda.get_device_capability(rows.device) >= TURING and count > 16 and inputs % 8 == outputs % 8 == 0


def in_int8(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same with each row of activations rounded to int8 by its own absmax: whole-number products, summed exactly.

    s = max|row| / 127, a = round(row / s): |row - a s| <= s / 2. No row depends on another. Exact sums make the
    figures alike on every processor, up to the roundings of s and of the result.
    """
    import torch

    from harness.methods.quantizing import cpu, products

    rows = x.reshape(-1, x.shape[-1]).float()  # (M, in)
    step = rows.abs().amax(dim=1, keepdim=True).div_(127)  # (M, 1)
    whole = torch.div(rows, step.clamp_min_(TINY)).round_()  # (M, in)
    if multiplies_int8(whole, codes):
        sums = torch._int_mm(whole.char(), codes.t())  # (M, out) int32
    elif (
        products.few_rows(whole, codes.shape[1])
        and whole.device.type == codes.device.type == "cpu"
        and compiled.available()
    ):
        sums = _by_loops(whole.char(), codes)
    else:
        sums = cpu.whole_sums(whole, codes)
    return products.finished(x, torch.mul(sums, step).mul_(scale.view(-1)), bias)  # (M, out) fp32


def _by_loops(whole: Tensor, codes: Tensor) -> Tensor:
    """Whole-number sums of a few rows, codes read as they lie: (M, in) int8, (out, in) int8 -> (M, out) int32."""
    import torch

    compiled.compile_loops(__name__)
    shape = codes.shape[0], codes.shape[1]
    loops = Loops((codes.numpy(),), shape, (_sum, _sum_shared), (_unpack, _unpack_shared))
    return loops.multiply(whole, torch.int32)


@loop(nogil=True, cache=True)
def _sum(x: Array, weight: tuple[Array], result: Array, start: int, stop: int) -> None:
    """Outputs from start to stop of x (M * in,) int8 into result (M * out,) int32; weight: codes (out, in) int8."""
    codes = weight[0]
    outputs, inputs = codes.shape
    wide, sums = x.reshape(-1, inputs), result.reshape(-1, outputs)
    for i in range(start, stop):
        row = codes[i]
        for m in range(len(wide)):
            line, total = wide[m], np.int32(0)
            for j in range(inputs):
                total = np.int32(total + np.int32(line[j]) * np.int32(row[j]))  # Numba would go on in 64 bits
            sums[m, i] = total


@loop(parallel=True, nogil=True, cache=True)
def _sum_shared(x: Array, weight: tuple[Array], result: Array, rows: int, threads: int) -> None:
    """`_sum`, shared out."""
    each = (rows + threads - 1) // threads
    for thread in prange(threads):
        _sum(x, weight, result, min(rows, thread * each), min(rows, (thread + 1) * each))


@loop(nogil=True, fastmath=compiled.SUMS, cache=True)
def _multiply(x: Array, weight: Weight, result: Array, start: int, stop: int) -> None:
    """Outputs from start to stop of x (M * in,) fp32 into result (M * out,) fp32.

    weight: codes (out, in) int8, scale and zero point, each (out,), or (1,) for all, fp32.
    """
    codes, scale, zero = weight
    outputs, inputs = codes.shape
    wide, sums = x.reshape(-1, inputs), result.reshape(-1, outputs)
    for i in range(start, stop):
        row, step, offset = codes[i], scale[min(i, len(scale) - 1)], zero[min(i, len(zero) - 1)]
        for m in range(len(wide)):
            total = np.float32(0)
            for j in range(inputs):
                total += wide[m, j] * (np.float32(row[j]) - offset)
            sums[m, i] = total * step


@loop(nogil=True, cache=True)
def _unpack(weight: Weight, first: int, result: Array, start: int, stop: int) -> None:
    """Rows from start to stop of result (rows * in,) fp32, which holds the weight's from `first` on, as dequantized."""
    codes, scale, zero = weight
    rows = result.reshape(-1, codes.shape[1])
    for i in range(start, stop):
        step, offset = scale[min(first + i, len(scale) - 1)], zero[min(first + i, len(zero) - 1)]
        for j in range(rows.shape[1]):
            rows[i, j] = (np.float32(codes[first + i, j]) - offset) * step


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


@loop(nogil=True, cache=True)
def _round(bits: Array, codes: Array, scale: Array) -> None:
    """Symmetric rows: bits (out, in) -> codes (out, in) int8, scale (out,) fp32.

    An absmax is taken of bits as whole numbers: their order is the same, and a NaN is the largest.
    """
    row, shift, largest = np.empty(bits.shape[1], np.float32), np.uint32(32 - 8 * bits.itemsize), scale.view(np.uint32)
    whole = row.view(np.uint32)
    for i in range(len(bits)):
        most, line, result = np.uint32(0), bits[i], codes[i]
        for j in range(len(row)):
            whole[j] = np.uint32(line[j]) << shift
            most = max(most, whole[j] & MAGNITUDE)
        largest[i] = most
        scale[i] /= np.float32(127)
        step = scale[i] if scale[i] != 0 else np.float32(1)
        for j in range(len(row)):
            result[j] = min(max(np.int32(np.rint(row[j] / step)), -127), 127)
