"""How docs/studies/nf4.md rounds and counts: as the methods do, and by hand."""

from __future__ import annotations

import pytest
import torch

from harness.core import catalog
from harness.core.contracts import Arguments
from harness.core.specification import parse
from harness.methods import nf4
from harness.methods.quantizing.arguments import resolve
from studies.quantizers import nf4_figures


def through_method(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight (out, in) as a catalogued method stores it."""
    method = catalog.methods()[name]
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.layers[0].up = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model.layers[0].up.weight = torch.nn.Parameter(weight, requires_grad=False)
    arguments: Arguments = resolve(parse(f"{name}:block=64"), method, "cpu")
    method.sketch(model, arguments)
    (stored,) = method.quantized(model)
    return stored.dequantize()


def test_the_page_s_rounding_is_the_methods() -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(3))
    made = {(kind, code): values for kind, code, _, values in nf4_figures.candidates(weight, 64)}
    known = {"linear-int4": ("symmetric", 4), "linear-int4-affine": ("affine", 4), "nf4": ("nf4", 4), "fp4": ("fp4", 4)}
    for name, key in known.items():
        torch.testing.assert_close(made[key].view(48, 128), through_method(name, weight), rtol=0, atol=1e-6)


def test_linear_codes_of_two_bits_by_hand() -> None:
    weight = torch.tensor([-1.0, -0.4, 0.6, 0.2] * 8)
    assert nf4_figures.symmetric(weight, 2, 32)[:4].tolist() == [-1.0, 0.0, 1.0, 0.0]
    affine = nf4_figures.affine(weight, 2, 32)[:4]  # -1 to 0.6 in three steps of 0.5333
    torch.testing.assert_close(affine, torch.tensor([-1.0, -1 + 1.6 / 3, 0.6, -1 + 3.2 / 3]))


def test_bits_count_scales() -> None:
    bits = {(kind, code): bits for kind, code, bits, _ in nf4_figures.candidates(torch.randn(1 << 16), 64)}
    assert bits["symmetric", 3] == 3.5
    assert bits["affine", 4] == 5.0
    assert bits["nf4", 4] == 4.5
    # codes 4, absmax 8 / 64, nested absmax 32 / (64 * 256), then 16 + 256 levels and an offset in fp32
    assert bits["nf4-dq", 4] == pytest.approx(4 + 8 / 64 + 32 / 2**14 + 32 * (16 + 256 + 1) / 2**16)


def test_nf4_s_levels_follow_from_the_definition() -> None:
    levels = nf4.LEVELS
    assert max(abs(ours - theirs) for ours, theirs in zip(nf4_figures.quantiles(), levels, strict=True)) < 1e-6


def test_shares_of_levels_add_up() -> None:
    shares = nf4_figures.use(nf4.LEVELS)
    assert sum(shares) == pytest.approx(1)
    assert shares[0] + shares[15] > 1 / 64  # the largest magnitude of every block takes an end
