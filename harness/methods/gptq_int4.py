"""GPTQ (Frantar et al. 2022): the grid and the bytes of `linear-int4`, its codes chosen so that outputs change least.

Columns whose inputs are strongest go first (`act_order`): a few of them carry most of the energy in real models, and
what they lose can then be made up for by all others. The paper goes from left to right (`act_order=no`). `linear-int4`
is the round-to-nearest that stands beside it in a table. Calibrated: on which text, with which seed and how many
windows stands in the method's id and in each measurement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.core.contracts import Arguments, Checkpoint, Parameter
from harness.methods.quantizing.weight_method import calibrated_method

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "gptq-int4"
DAMP = 0.01  # the paper's


def calibrate(
    model: nn.Module, names: list[str], windows: list[Tensor], checkpoint: Checkpoint, arguments: Arguments, device: str
) -> None:
    """Quantize the named modules on the windows."""
    from harness.methods.quantizing import gptq

    values: Any = arguments.values
    options = gptq.GptqOptions(values["block"], values["damp"], values["act_order"] == "yes")
    gptq.apply(model, names, windows, options, lambda tensors: gptq.recipe(NAME, options.block, tensors))


METHOD = calibrated_method(
    name=NAME,
    summary="GPTQ: symmetric int4 in blocks, codes calibrated on text",
    calibrate=calibrate,
    parameters={
        "act_order": Parameter(str, "yes", "quantize columns by falling activation energy", ("no", "yes")),
        "damp": Parameter(float, DAMP, "of the mean diagonal of the inputs' second moments, added to it"),
    },
    concurrent=True,
)
