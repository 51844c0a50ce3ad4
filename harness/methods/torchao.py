"""torchao's methods: its tensor subclasses in nn.Linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness.core.contracts import Method, Parameter
from harness.methods.quantizing.weight_method import GROUP, layer_method

if TYPE_CHECKING:  # annotations only
    from torch import nn


def torchao_method(
    name: str, summary: str, bits: float, config: str, parameters: Mapping[str, Parameter] | None = None
) -> Method:
    """The method of one of the library's configurations, by its class's name."""

    def replace(layer: nn.Linear, group: int = 0) -> nn.Module:
        import torch
        from torch import nn
        from torchao import quantization

        options: dict[str, Any] = {}
        if group:
            options = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(group)}  # type: ignore[attr-defined]
        quantization.quantize_(nn.Sequential(layer), getattr(quantization, config)(**options))
        # no plain nn.Linear any more, though of the same forward: nothing may take its weight for a plain one
        layer.__class__ = type("TorchaoLinear", (nn.Linear,), {"__module__": __name__})
        return layer

    return layer_method(
        name=name,
        summary=summary,
        bits=bits,
        requires=("torchao",),
        replace=replace,
        tensors=lambda layer: [layer.weight],
        read=lambda layer: layer.weight.dequantize(),
        parameters=parameters,
    )


METHODS = (
    # symmetric int8, one scale an output channel; activations as they are
    torchao_method("torchao-int8", "torchao int8 weight-only, a scale per output channel", 8, "Int8WeightOnlyConfig"),
    # weights as in torchao-int8, activations int8 too, a scale a token found at each forward
    torchao_method(
        "torchao-int8-dynamic",
        "torchao int8 weights and activations, scales per channel and token",
        8,
        "Int8DynamicActivationInt8WeightConfig",
    ),
    # the library packs int4 on CUDA only; what runs on any device (`IntxWeightOnlyConfig`) keeps a code in a byte,
    # which the memory columns show
    torchao_method(
        "torchao-int4",
        "torchao int4 weight-only in groups, codes kept in bytes",
        4,
        "IntxWeightOnlyConfig",
        {"group": GROUP},
    ),
)
