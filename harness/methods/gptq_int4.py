"""GPTQ (Frantar et al. 2022): the grid and the bytes of `linear-int4`, its codes chosen so that outputs change least.

`linear-int4` is the round-to-nearest that stands beside it in a table. Calibrated: on which text, with which seed and
how many windows stands in the method's id and in each measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from harness import calibration, scopes
from harness.codes import BLOCK, rescale, unpack
from harness.contracts import Arguments, Checkpoint, Method, Parameter, QuantizedWeight, Scope
from harness.errors import BadSpecification, HarnessError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness import quantized

NAME = "gptq-int4"


def room(weight: Tensor, block: int) -> dict[str, Tensor]:
    """(out, in) -> tensors of the shapes and dtypes that are stored."""
    import torch

    if weight.shape[1] % block:
        raise HarnessError(f"a row of {weight.shape[1]} weights is no multiple of {block}: write {NAME}:block=N")
    codes = torch.empty((weight.numel() + 1) // 2, dtype=torch.uint8, device=weight.device)
    return {"codes": codes, "scale": torch.zeros(weight.numel() // block, device=weight.device)}


def dequantize(stored: Mapping[str, Tensor], shape: tuple[int, int], block: int) -> Tensor:
    """(out, in) fp32."""
    import torch

    levels = torch.arange(-8.0, 8.0, device=stored["codes"].device)
    values = unpack(stored["codes"], levels, shape[0] * shape[1])
    return rescale(values, block, stored["scale"]).view(shape)


def recipe(arguments: Arguments, stored: Mapping[str, Tensor] | None = None) -> quantized.Recipe:
    """How `harness.quantized` keeps a matrix: these tensors, or room for them."""
    from harness import quantized

    block = int(arguments.values["block"])

    def take(weight: Tensor, block: int) -> dict[str, Tensor]:
        sized = room(weight, block)  # refuses what does not divide
        return sized if stored is None else dict(stored)

    return quantized.Recipe(NAME, take, dequantize, values={"block": block})


def targets(model: nn.Module, arguments: Arguments) -> list[str]:
    """The scope's projections; embeddings, head and norms have no inputs to calibrate on."""
    scope = arguments.scope or Scope()
    if scope.part == "all":
        raise BadSpecification(f"{NAME} quantizes projections inside the layers: write linear, attention or mlp")
    return scopes.select(model, scope)


def sketch(model: nn.Module, arguments: Arguments) -> None:
    """Room for codes and scales."""
    from harness import quantized

    quantized.apply(model, recipe(arguments), targets(model, arguments))


def load(checkpoint: Checkpoint, arguments: Arguments, device: str) -> nn.Module:
    """The checkpoint, calibrated and quantized."""
    from harness import checkpoints, gptq

    model = checkpoints.open_model(checkpoint, arguments.dtype, device)
    names = targets(model, arguments)
    for name in names:
        room(gptq.matrix(model.get_submodule(name)), int(arguments.values["block"]))
    windows, facts = calibration.windows(model, checkpoint, arguments)
    values = arguments.values
    options = gptq.Options(int(values["block"]), float(values["damp"]), values["act_order"] == "yes")
    gptq.apply(model, names, windows, options, lambda stored: recipe(arguments, stored))
    model.calibration = facts  # type: ignore[assignment]
    return model


def weights(model: nn.Module) -> Iterator[QuantizedWeight]:
    """The quantized weights of a loaded or sketched model."""
    from harness import quantized

    return quantized.weights(model)


METHOD = Method(
    NAME,
    "GPTQ: symmetric int4 in blocks, codes calibrated on text",
    4,
    load,
    sketch,
    weights,
    targets,
    {
        "block": BLOCK,
        "act_order": Parameter(str, "no", "quantize columns by falling activation energy", ("no", "yes")),
        "damp": Parameter(float, 0.01, "of the mean diagonal of the inputs' second moments, added to it"),
        **calibration.PARAMETERS,
    },
    scoped=True,
    core=False,
    calibrated=True,
)
