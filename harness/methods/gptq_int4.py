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


def calibrate(
    model: nn.Module, names: list[str], windows: list[Tensor], checkpoint: Checkpoint, arguments: Arguments, device: str
) -> None:
    """Quantize the named modules on the windows."""
    from harness.methods.quantizing import gptq

    values: Any = arguments.values
    gptq.apply(model, names, windows, values["block"], values["damp"], values["act_order"] == "yes")


METHOD = calibrated_method(
    name="gptq-int4",
    summary="GPTQ: symmetric int4 in blocks, codes calibrated on text",
    calibrate=calibrate,
    parameters={
        "act_order": Parameter(str, "yes", "quantize columns by falling activation energy", ("no", "yes")),
        "damp": Parameter(
            float, 0.01, "of the mean diagonal of the inputs' second moments, added to it"
        ),  # the paper's
    },
    concurrent=True,
)
