"""Half precision through fp32 beside torch's own half product, on layers of GPT-2's true widths."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.methods.quantizing import cpu

WIDTHS = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]  # attention in and out, MLP in and out
TOKENS = 64
STEP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # from one number to its neighbour, relative
# seen on a processor without half products: 1e-5 to 2.5e-5 apart in the Frobenius norm, 0.2% to 0.4% (fp16) and under
# 0.05% (bf16) of the results not the same number
APART, SAME = 6e-5, 0.99


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", [Conv1D, nn.Linear], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_half_product_through_fp32_is_as_exact_as_torchs_and_now_and_then_its_neighbour(
    dtype: torch.dtype, kind: type[nn.Module]
) -> None:
    for inputs, outputs in WIDTHS:
        weight, bias = normal(inputs, outputs, seed=1, scale=0.02), normal(outputs, seed=2, scale=0.1)
        x = normal(TOKENS, inputs, seed=3).to(dtype)
        layer = (Conv1D(outputs, inputs) if kind is Conv1D else nn.Linear(inputs, outputs)).to(dtype)
        layer.load_state_dict({"weight": weight if kind is Conv1D else weight.T, "bias": bias})
        with torch.inference_mode():
            torchs = layer(x).double()
            ours = (cpu.conv1d_in_fp32 if kind is Conv1D else cpu.linear_in_fp32)(layer, x).double()
            exact = x.double() @ weight.to(dtype).double() + bias.to(dtype).double()
        assert off(ours, exact) < 0.25 * STEP[dtype]  # one rounding of the exact sum
        if cpu.native(dtype):  # torch's own products are used there, and round in their own way
            continue
        assert off(ours, exact) < 1.001 * off(torchs, exact)
        assert off(ours, torchs) < APART
        assert float((ours == torchs).double().mean()) > SAME
        assert bool(((ours - torchs).abs() <= STEP[dtype] * exact.abs() + 1e-5).all())
