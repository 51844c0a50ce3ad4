"""GPTQ (Frantar et al. 2022, arXiv:2210.17323, algorithm 1) onto a symmetric int4 grid, written from the paper.

For a layer with inputs X the squared error of its output is tr((W - Q) H (W - Q)^T), H = X X^T. Columns are rounded one
after another, and what a column loses is made up for by those still to come: with U the upper Cholesky factor of
H^-1, the weights right of column i move by -(w_i - q_i) / U_ii * U_i,j. The updates of `lazy` columns are gathered
into one product. H is damped by a share of its mean diagonal; an input that is always 0 gets weight 0.

The grid is that of `linear-int4`: step max|w| / 7 in blocks of a row, codes -7..7. Without act-order a block's step is
taken when its turn comes, from weights that earlier columns have moved (the paper's grouping); with act-order columns
go by falling diagonal of H, and steps are taken from the original weights, so that blocks stay runs of a row.

Layers are quantized front to back, each on inputs that have come through the quantized ones before it.

What is stored are the bytes of `linear-int4`, for every method that chooses codes by looking at inputs: it hands over
finished tensors, or none where only room is wanted (predicted bytes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.core import progress
from harness.core.errors import HarnessError
from harness.methods.quantizing import stored
from harness.methods.quantizing.arguments import layer_lists
from harness.methods.quantizing.codes import Functions, Recipe, divide
from harness.methods.quantizing.int4 import Steps4, pack

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer is called with
LARGEST = 7  # of a code
LAZY = 128  # columns whose updates are gathered: the paper's B, of no influence on the result but rounding


def steps(weight: Tensor, block: int) -> Tensor:
    """(out, in) -> (out, in / block): max|w| / 7 of each block of a row."""
    return weight.view(weight.shape[0], -1, block).abs().amax(dim=2) / LARGEST


def quantize(weight: Tensor, hessian: Tensor, block: int, damp: float, act_order: bool) -> dict[str, Tensor]:
    """One matrix.

    Args:
        weight: (out, in) fp32.
        hessian: (in, in) fp32, the sum of x x^T over inputs x.
        block: weights that share a step; must divide `in`.
        damp: of H's mean diagonal, added to it.
        act_order: columns by falling diagonal of H.

    Returns:
        codes (ceil(out * in / 2),) uint8, scale (out * in / block,) fp32, as `linear-int4` stores them.
    """
    weight, hessian = weight.clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    columns = weight.shape[1]
    scale = steps(weight, block)  # (out, blocks)
    order = torch.arange(columns, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    moved, places = weight[:, order], order.tolist()
    damped = hessian[order][:, order].double()
    damped.diagonal().add_(damp * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True).float()  # U, (in, in)
    result = torch.empty_like(weight)  # codes, in the order of the columns as they lie
    for start in range(0, columns, LAZY):
        stop = min(start + LAZY, columns)
        losses = torch.empty_like(moved[:, start:stop])  # (out, lazy)
        for at in range(start, stop):
            column = places[at]
            if not act_order and column % block == 0:
                scale[:, column // block] = steps(moved[:, at : at + block], block)[:, 0]
            step = scale[:, column // block]
            code = divide(moved[:, at], step).round_().clamp_(-LARGEST, LARGEST)
            result[:, column] = code
            losses[:, at - start] = (moved[:, at] - code * step) / factor[at, at]
            moved[:, at:stop] -= losses[:, at - start, None] * factor[at, at:stop]
        moved[:, stop:] -= losses @ factor[start:stop, stop:]
    return packed(result, scale)


class Inputs:
    """The Hessian of one module's inputs, gathered by a forward hook."""

    def __init__(self, module: nn.Module) -> None:
        self.sum: Tensor | None = None
        self._hook = module.register_forward_pre_hook(self._take)

    def _take(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        rows = given[0].detach().float().flatten(0, -2)  # (tokens, in)
        product = rows.T @ rows
        self.sum = product if self.sum is None else self.sum.add_(product)

    def close(self) -> Tensor:
        """(in, in) fp32; HarnessError where the module saw no input."""
        self._hook.remove()
        if self.sum is None:
            raise HarnessError("gptq-int4 saw no input for a module: its calibration text never reached it")
        return self.sum


def apply(
    model: Any, names: Sequence[str], windows: Sequence[Tensor], block: int, damp: float, act_order: bool
) -> None:
    """Quantize the named modules in place, layer by layer.

    Args:
        model: unquantized, in eval mode.
        names: of Linear and Conv1D modules inside the decoder layers.
        windows: calibration token ids, (1, L) each.
        block: as of `quantize`.
        damp: likewise.
        act_order: likewise.
    """
    lists = layer_lists(model)
    if len(lists) > 1:
        raise HarnessError(f"gptq-int4 walks one list of layers; {type(model).__name__} has {', '.join(lists)}")
    ((stack, depth),) = lists.items()
    with torch.no_grad():
        calls = _calls(model, [model.get_submodule(f"{stack}.{number}") for number in range(depth)], windows)
        hidden = [given[0][0][0] for given in calls]  # (1, L, H) before the first layer, a window each
        for number in range(depth):
            layer, prefix = model.get_submodule(f"{stack}.{number}"), f"{stack}.{number}."
            inside = [name for name in names if name.startswith(prefix)]
            inputs = {name: Inputs(model.get_submodule(name)) for name in inside}
            if inside:
                _through(layer, hidden, [call[number] for call in calls])
            for name, gathered in inputs.items():
                module = model.get_submodule(name)
                weight = module.weight.detach().float()
                weight = (weight.T if isinstance(module, Conv1D) else weight).contiguous()  # (out, in)
                tensors = quantize(weight, gathered.close(), block, damp, act_order)
                stored.apply(model, recipe("gptq-int4", block, tensors), [name])
            hidden = _through(layer, hidden, [call[number] for call in calls])


def _calls(model: Any, layers: Sequence[nn.Module], windows: Sequence[Tensor]) -> list[list[Call]]:
    """What each layer is called with in each window; of hidden states only the first layer's are kept."""
    result: list[list[Call]] = []

    def note(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        kept = given[:1] if layer is layers[0] else (None,)
        result[-1].append(((*kept, *given[1:]), dict(named)))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        for window in windows:
            result.append([])
            model(input_ids=window, use_cache=False)
            if len(result[-1]) != len(layers) or result[-1][0][0][:1] == ():
                raise HarnessError(f"gptq-int4 does not know how {type(model).__name__} calls its layers")
    finally:
        for hook in hooks:
            hook.remove()
    return result


def _through(layer: nn.Module, hidden: Sequence[Tensor], calls: Sequence[Call]) -> list[Tensor]:
    """The layer's outputs for every window."""
    result = []
    for states, (given, named) in zip(hidden, calls, strict=True):
        progress.note("a window to calibrate on")
        output = layer(states, *given[1:], **named)
        result.append(output[0] if isinstance(output, tuple) else output)
    return result


def refuse_ragged(inputs: int, block: int, method: str) -> None:
    """HarnessError where blocks do not divide a row."""
    if inputs % block:
        raise HarnessError(f"a row of {inputs} weights is no multiple of {block}: write {method}:block=N")


def packed(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Codes -8..7 (out, in) and steps (out, in / block) as they are kept."""
    return {"codes": pack((codes - Steps4.first).byte(), codes.numel()), "scale": scale.float().flatten().contiguous()}


def recipe(method: str, block: int, kept: Mapping[str, Tensor] | None = None) -> Recipe:
    """How a matrix is stored: these tensors, or room for them; read as `linear-int4`'s are."""

    def take(weight: Tensor, block: int) -> dict[str, Tensor]:
        refuse_ragged(weight.shape[1], block, method)
        if kept is not None:
            return dict(kept)
        codes = torch.empty((weight.numel() + 1) // 2, dtype=torch.uint8, device=weight.device)
        return {"codes": codes, "scale": torch.zeros(weight.numel() // block, device=weight.device)}

    return Recipe(method, Functions(take, Steps4().decode), {"block": block})
