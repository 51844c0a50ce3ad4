"""Quantizing a weight part by part: what is made on the way stays in the cache, and parts run a thread a core."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.core.errors import HarnessError

if TYPE_CHECKING:
    from harness.methods.quantizing.codes import Recipe
    from harness.methods.quantizing.compiled import Rounding

PART = 2**18  # weights quantized at once: a megabyte in fp32, and few enough operations to be worth a thread
CARD_PART = 2**22  # on a card: as much work as makes a kernel worth its launch, and little beside a model
TAKEN = frozenset({torch.float32, torch.bfloat16})  # by a compiled loop, as they lie


def quantize(recipe: Recipe, rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the recipe makes of a weight (out, in) rounded to a dtype, some rows at a time where their grain allows.

    Raises:
        HarnessError: a weight or a scale is not finite.
    """
    loop = None
    if rows.device.type == "cpu" and rows.numel() > PART:
        loop = recipe.codes.rounding((rows.shape[0], rows.shape[1]), **recipe.values)
    whole = _in_parts(recipe, rows, dtype) if loop is None else _by_loop(loop, rows, dtype)
    for name, tensor in whole.items():
        if not _finite(tensor):
            _refuse(recipe, "weight", rows.to(dtype))
            _refuse(recipe, name, tensor)
    return whole


def quantize_all(recipe: Recipe, matrices: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same of matrices (count, out, in), each by itself: tensors (count, ...), but for a single one."""
    first = quantize(recipe, matrices[0], dtype)
    if len(matrices) == 1:
        return first
    whole = {name: made.new_empty((len(matrices), *made.shape)) for name, made in first.items()}
    for place in range(1 if matrices.is_meta else len(matrices)):  # equal shapes make equal bytes: one tells them all
        made = quantize(recipe, matrices[place], dtype) if place else first
        for name, tensor in made.items():
            whole[name][place].copy_(tensor)
    return whole


def _by_loop(loop: Rounding, rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """A compiled loop over the weight as it lies, a share a thread; over parts of it where they must be made."""
    outputs, inputs = rows.shape
    as_lies = rows.is_contiguous() and rows.dtype in TAKEN and dtype in (rows.dtype, torch.float32)
    step = max(1, PART // inputs)
    if as_lies:
        step = max(step, -(-outputs // torch.get_num_threads()))

    def place(start: int) -> None:
        part = rows[start : start + step]
        loop.fill(start, part if as_lies else _fp32(part, dtype))

    _in_threads(place, range(0, outputs, step))
    return loop.result


def _in_parts(recipe: Recipe, rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The codes' own operations on a part at a time, into room for what they make of the whole weight."""
    step = _part(recipe, rows)
    first = recipe.codes.encode(_fp32(rows[:step], dtype), **recipe.values)
    if step >= rows.shape[0]:
        return first
    like = torch.empty(rows.shape, dtype=torch.float32, device="meta")
    sizes = recipe.codes.encode(like, **recipe.values)  # as bytes are predicted
    whole = {name: rows.new_empty(sizes[name].shape, dtype=made.dtype) for name, made in first.items()}
    starts = range(0, rows.shape[0], step)
    for name, made in first.items():
        if not made.dim() or -(-len(whole[name]) // len(made)) != len(starts):
            raise HarnessError(
                f"{recipe.method} stores no part of its {name} for each part of a weight: leave out grain"
            )

    def place(start: int) -> None:
        made = recipe.codes.encode(_fp32(rows[start : start + step], dtype), **recipe.values) if start else first
        for name, tensor in made.items():
            at = start // step * len(first[name])
            whole[name][at : at + len(tensor)] = tensor

    if rows.device.type == "cpu":
        _in_threads(place, starts)
    else:  # a stream runs kernels one after another, whoever launches them
        deque(map(place, starts), maxlen=0)
    return whole


def _in_threads(place: Callable[[int], None], starts: Sequence[int]) -> None:
    """A thread a core: operations on so few numbers gain nothing from threads inside."""
    if len(starts) == 1:
        place(starts[0])
        return
    inference = torch.is_inference_mode_enabled()  # a thread's own affair, as the number of threads is

    def run(start: int) -> None:
        with torch.inference_mode(inference):
            place(start)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        deque(pool.map(run, starts), maxlen=0)  # raises what a part raised
    torch.set_num_threads(threads)  # which threads that are born later take over


def _fp32(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.to(dtype).float().contiguous()


def _part(recipe: Recipe, rows: Tensor) -> int:
    """Rows quantized at once: about PART weights, no block or byte of two codes cut; all of a meta weight."""
    kind = rows.device.type
    if not recipe.codes.grain or kind == "meta":
        return max(1, rows.shape[0])
    unit = math.lcm(2, int(recipe.values["block"]) if recipe.codes.grain == "block" else 1)
    apart = unit // math.gcd(unit, rows.shape[1])  # rows between two possible cuts
    return apart * max(1, (PART if kind == "cpu" else CARD_PART) // (apart * rows.shape[1]))


def _finite(tensor: Tensor) -> bool:
    """Whether all is finite, in one pass without a mask: a NaN is both the least and the largest value."""
    return tensor.is_meta or not tensor.is_floating_point() or all(bool(end.isfinite()) for end in tensor.aminmax())


def _refuse(recipe: Recipe, name: str, tensor: Tensor) -> None:
    count = int((~tensor.isfinite()).sum())
    if count:
        raise HarnessError(f"{recipe.method} cannot quantize it: {count} non-finite values in its {name}")
