"""Quantizing a weight piece by piece: what is made on the way stays in the cache, and pieces run a thread a core."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.quantized import Recipe

PIECE = 2**18  # weights quantized at once: a megabyte in fp32, and few enough operations to be worth a thread


def quantize(recipe: Recipe, rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the recipe makes of a weight (out, in) rounded to a dtype, piece by piece where its grain allows.

    Raises:
        HarnessError: a weight or a scale is not finite.
    """
    step = _piece(recipe, rows)
    first = recipe.quantize(_fp32(rows[:step], dtype), **recipe.values)
    whole = first if step >= rows.shape[0] else _joined(recipe, rows, dtype, step, first)
    for name, tensor in whole.items():
        if not _finite(tensor):
            _refuse(recipe, "weight", rows.to(dtype))
            _refuse(recipe, name, tensor)
    return whole


def _joined(
    recipe: Recipe, rows: Tensor, dtype: torch.dtype, step: int, first: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The pieces behind the first, a thread a core: operations on so few numbers gain nothing from threads inside."""
    parts = rows.shape[0] / step
    whole = {name: made.new_empty((math.ceil(len(made) * parts), *made.shape[1:])) for name, made in first.items()}
    inference = torch.is_inference_mode_enabled()  # a thread's own affair, as the number of threads is

    def place(start: int) -> None:
        with torch.inference_mode(inference):
            made = recipe.quantize(_fp32(rows[start : start + step], dtype), **recipe.values) if start else first
            for name, tensor in made.items():
                at = start // step * len(first[name])
                whole[name][at : at + len(tensor)] = tensor

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        deque(pool.map(place, range(0, rows.shape[0], step)), maxlen=0)  # raises what a piece raised
    torch.set_num_threads(threads)  # which threads that are born later take over
    return whole


def _fp32(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.to(dtype).float().contiguous()


def _piece(recipe: Recipe, rows: Tensor) -> int:
    """Rows quantized at once: about PIECE weights, no block or byte of two codes cut; all of a meta weight."""
    if not recipe.grain or rows.is_meta:
        return max(1, rows.shape[0])
    unit = math.lcm(2, int(recipe.values["block"])) if recipe.grain == "block" else 1
    apart = unit // math.gcd(unit, rows.shape[1])  # rows between two possible cuts
    return apart * max(1, PIECE // (apart * rows.shape[1]))


def _finite(tensor: Tensor) -> bool:
    """Whether all is finite, in one pass without a mask: a NaN is both the least and the largest value."""
    return tensor.is_meta or not tensor.is_floating_point() or all(bool(end.isfinite()) for end in tensor.aminmax())


def _refuse(recipe: Recipe, name: str, tensor: Tensor) -> None:
    count = int((~tensor.isfinite()).sum())
    if count:
        raise HarnessError(f"{recipe.method} cannot quantize it: {count} non-finite values in its {name}")
