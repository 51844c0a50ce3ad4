"""HQQ (half-quadratic quantization): 4-bit affine codes in groups, zero points fitted to the weights alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.methods.quantizing.weight_method import GROUP, layer_method

if TYPE_CHECKING:
    from torch import nn


def replace(layer: nn.Linear, group: int) -> nn.Module:
    """The library's layer."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=group, axis=1)
    weight = layer.weight
    made: nn.Module = HQQLinear(layer, config, compute_dtype=weight.dtype, device=str(weight.device), del_orig=True)
    return made


def sketch(layer: nn.Linear, group: int) -> nn.Module:
    """Tensors of the same sizes: two codes a byte, a scale and a zero point a group, and the bias."""
    import torch
    from torch import nn

    count, dtype, bias = layer.weight.numel(), layer.weight.dtype, layer.bias
    made: Any = nn.Module()
    made.in_features, made.out_features = layer.in_features, layer.out_features
    made.W_q = nn.Parameter(torch.empty(count // 2, dtype=torch.uint8, device="meta"), requires_grad=False)
    made.meta = {name: torch.empty(count // group, 1, dtype=dtype, device="meta") for name in ("scale", "zero")}
    made.bias = None if bias is None else bias.detach()  # the library keeps it outside parameters and buffers
    return made  # type: ignore[no-any-return]


METHOD = layer_method(
    name="hqq-int4",
    summary="HQQ 4-bit affine codes in groups, fitted without calibration",
    bits=4,
    requires=("hqq",),
    replace=replace,
    tensors=lambda layer: [layer.W_q, layer.meta["scale"], layer.meta["zero"]],
    read=lambda layer: layer.dequantize(),
    sketch=sketch,
    parameters={"group": GROUP},
)
