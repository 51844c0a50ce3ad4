"""GPTQ (Frantar et al. 2022): the grid and the bytes of `linear-int4`, its codes chosen so that outputs change least.

Columns whose inputs are strongest go first (`act_order`): a few of them carry most of the energy in real models, and
what they lose can then be made up for by all others. The paper goes from left to right (`act_order=no`). `linear-int4`
is the round-to-nearest that stands beside it in a table. Calibrated: on which text, with which seed and how many
windows stands in the method's id and in each measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from harness.core.contracts import Arguments, Checkpoint, Method, Parameter, QuantizedWeight, Scope
from harness.core.errors import BadSpecification
from harness.methods.quantizing import calibration, scopes
from harness.methods.quantizing.codes import BLOCK

if TYPE_CHECKING:
    from torch import nn

NAME = "gptq-int4"
DAMP = 0.01  # the paper's


def targets(model: nn.Module, arguments: Arguments) -> list[str]:
    """The scope's projections; embeddings, head and norms have no inputs to calibrate on."""
    scope = arguments.scope or Scope()
    if scope.part == "all":
        raise BadSpecification(f"{NAME} quantizes projections inside the layers: write linear, attention or mlp")
    return scopes.select(model, scope)


def sketch(model: nn.Module, arguments: Arguments) -> None:
    """Room for codes and scales."""
    from harness.methods.quantizing import gptq as int4_store
    from harness.methods.quantizing import stored as quantized

    quantized.apply(model, int4_store.recipe(NAME, int(arguments.values["block"])), targets(model, arguments))


def load(checkpoint: Checkpoint, arguments: Arguments, device: str) -> nn.Module:
    """The checkpoint, calibrated and quantized."""
    from harness.inputs.models import checkpoints
    from harness.methods.quantizing import gptq
    from harness.methods.quantizing import gptq as int4_store

    model = checkpoints.open_model(checkpoint, arguments.dtype, device)
    names = targets(model, arguments)
    for name in names:
        int4_store.room(gptq.matrix(model.get_submodule(name)), int(arguments.values["block"]), NAME)
    windows, facts = calibration.windows(model, checkpoint, arguments)
    values = arguments.values
    options = gptq.Options(int(values["block"]), float(values["damp"]), values["act_order"] == "yes")
    gptq.apply(model, names, windows, options, lambda stored: int4_store.recipe(NAME, options.block, stored))
    model.calibration = facts  # type: ignore[assignment]
    return model


def weights(model: nn.Module) -> Iterator[QuantizedWeight]:
    """The quantized weights of a loaded or sketched model."""
    from harness.methods.quantizing import stored as quantized

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
        "act_order": Parameter(str, "yes", "quantize columns by falling activation energy", ("no", "yes")),
        "damp": Parameter(float, DAMP, "of the mean diagonal of the inputs' second moments, added to it"),
        **calibration.PARAMETERS,
    },
    scoped=True,
    core=False,
    calibrated=True,
    concurrent=True,
)
