"""optimum-quanto's methods: its QLinear layers, frozen."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from harness.core.contracts import Method
from harness.methods.quantizing.weight_method import layer_method

if TYPE_CHECKING:  # annotations only
    from torch import Tensor, nn


def quanto_method(name: str, summary: str, bits: float, kind: str) -> Method:
    """The method of one of the library's weight types."""

    def replace(layer: nn.Linear) -> nn.Module:
        from optimum import quanto
        from torch import nn

        holder = nn.Sequential(layer)
        quanto.quantize(holder, weights=getattr(quanto, kind))
        quanto.freeze(holder)
        replaced: nn.Module = holder[0]
        replaced.__class__ = _outside_inference_mode(type(replaced))  # type: ignore[arg-type]
        return replaced

    return layer_method(
        name=name,
        summary=summary,
        bits=bits,
        requires=("optimum-quanto",),
        replace=replace,
        tensors=lambda layer: [layer.weight],
        read=lambda layer: layer.weight.dequantize(),
    )


@functools.cache
def _outside_inference_mode(kind: Any) -> Any:
    """The layer's class, its forward run without inference mode, in which the library's packed tensors fail."""
    import torch

    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            result: Tensor = kind.forward(self, x.clone())  # a clone is no inference tensor
        return result

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": __name__})


METHODS = (
    # symmetric, one scale an output channel
    quanto_method("quanto-int8", "optimum-quanto int8 weights, a scale per output channel", 8, "qint8"),
    # affine, in groups of 128 of a row, fewer where 128 does not divide it
    quanto_method("quanto-int4", "optimum-quanto int4 weights, affine in groups", 4, "qint4"),
)
