"""Packing, blocks and tables of levels, against hand-computed values, bitsandbytes and the levels' own definitions."""

import math
from itertools import product
from statistics import NormalDist

import bitsandbytes.functional
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.methods import fp4, nf4
from harness.methods.quantizing.codes import divide
from harness.methods.quantizing.int4 import Blocks4, blocks, nearest, pack, rescale, unpack

TABLES = {"nf4": nf4.LEVELS, "fp4": fp4.LEVELS}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    flat = packed.reshape(-1)
    return torch.stack((flat >> 4, flat & 15), dim=1).reshape(-1)


def test_pack_puts_the_first_code_high() -> None:
    assert pack(torch.tensor([[1, 2, 3], [15, 0, 9]], dtype=torch.uint8), 5).tolist() == [0x12, 0x3F, 0x00]
    assert pack(torch.tensor([1, 2, 3, 15], dtype=torch.uint8), 4).tolist() == [0x12, 0x3F]


@given(st.lists(st.integers(0, 15), min_size=1, max_size=70))
@settings(max_examples=100, deadline=None)
def test_unpack_undoes_pack(codes: list[int]) -> None:
    levels = torch.arange(16.0) * 3 - 7
    found = unpack(pack(torch.tensor(codes, dtype=torch.uint8), len(codes)), levels, len(codes))
    assert found.tolist() == [code * 3.0 - 7 for code in codes]


def test_blocks_fill_up_with_the_last_value() -> None:
    assert blocks(torch.tensor([[1.0, 2.0], [3.0, -4.0], [5.0, 6.0]]), 4).tolist() == [[1, 2, 3, -4], [5, 6, 6, 6]]
    assert blocks(torch.tensor([[1.0, 2.0]]), 2).tolist() == [[1, 2]]


def test_rescale_by_hand() -> None:
    scale, minimum = torch.tensor([10.0, 100.0]), torch.tensor([1.0, 2.0])
    assert rescale(torch.tensor([1.0, 2, 3, 4, 5]), 4, scale).tolist() == [10, 20, 30, 40, 500]
    assert rescale(torch.tensor([1.0, 2, 3, 4, 5]), 4, scale, minimum).tolist() == [11, 21, 31, 41, 502]
    assert rescale(torch.tensor([1.0, 2, 3, 4]), 2, scale).tolist() == [10, 20, 300, 400]


def test_divide_by_a_zero_scale_gives_zero() -> None:
    assert divide(torch.zeros(2, 3), torch.tensor([[0.0], [2.0]])).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_nf4_levels_are_quantiles_of_the_normal_distribution() -> None:
    """QLoRA: probabilities step evenly from the tail's to 1/2, 8 steps above 0 and 7 below; 0 is exact."""
    tail = 1 - (1 / 32 + 1 / 30) / 2  # mean of half a step from 1 of 16 and of 15 levels
    quantile = NormalDist().inv_cdf
    above = [quantile(tail + (0.5 - tail) * step / 8) for step in range(8)]
    below = [-quantile(tail + (0.5 - tail) * step / 7) for step in range(7)]
    derived = sorted([*below, 0.0, *above])
    assert np.allclose(np.array(derived) / max(above), nf4.LEVELS, rtol=0, atol=5e-7)  # fp32 rounding of the paper
    assert nf4.LEVELS == tuple(sorted(nf4.LEVELS))


def test_fp4_levels() -> None:
    given = [0, 0.0052083, 0.66667, 1, 0.33333, 0.5, 0.16667, 0.25]  # bitsandbytes' comment, sign bit 8
    assert np.allclose(fp4.LEVELS, given + [-level for level in given], rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", TABLES)
def test_levels_are_bitsandbytes_to_the_bit(kind: str) -> None:
    state = bitsandbytes.functional.quantize_4bit(normal(4, 64), blocksize=64, quant_type=kind)[1]
    assert torch.equal(state.code, torch.tensor(TABLES[kind]))


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("block", [64, 128])
def test_codes_and_absmax_are_bitsandbytes(kind: str, block: int) -> None:
    weight = normal(512, 1024, seed=3)
    stored = Blocks4(TABLES[kind]).encode(weight, block)
    theirs, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=block, quant_type=kind)
    assert torch.equal(stored["scale"], state.absmax)
    levels = torch.tensor(TABLES[kind])
    ours, others = levels[nibbles(stored["codes"]).int()], levels[nibbles(theirs).int()]  # FP4 spells 0 twice
    differ = ours != others
    assert differ.float().mean() <= 1e-4
    ascending = torch.tensor(sorted(set(levels.double().tolist())), dtype=torch.float64)
    midpoints = (ascending[1:] + ascending[:-1]) / 2
    scaled = weight.double().view(-1, block) / stored["scale"].double()[:, None]
    nearest_midpoint = midpoints[(scaled.view(-1, 1)[differ] - midpoints).abs().argmin(dim=1)]
    ulp = torch.from_numpy(np.spacing(nearest_midpoint.abs().numpy().astype(np.float32)))
    assert bool(((scaled.view(-1)[differ] - nearest_midpoint).abs() <= ulp).all())


@pytest.mark.parametrize("kind", TABLES)
def test_dequantized_values_are_bitsandbytes(kind: str) -> None:
    weight = normal(96, 64, seed=5)
    theirs, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    stored = {"codes": theirs.view(-1), "scale": state.absmax, "levels": torch.tensor(TABLES[kind])}
    expected = bitsandbytes.functional.dequantize_4bit(theirs, state)
    assert torch.equal(Blocks4(TABLES[kind]).decode(stored, (96, 64), 64), expected)


@pytest.mark.parametrize(("kind", "expected"), [("nf4", 0.0728), ("fp4", 0.0966)])
def test_mean_error_on_normal_weights(kind: str, expected: float) -> None:
    weight = normal(2048, 2048, seed=11)
    stored = Blocks4(TABLES[kind]).encode(weight, 64) | {"levels": torch.tensor(TABLES[kind])}
    error = (Blocks4(TABLES[kind]).decode(stored, (2048, 2048), 64) - weight).abs().mean().item()
    assert abs(error - expected) < 2e-4


@pytest.mark.parametrize("kind", TABLES)
def test_nearest_is_the_argmin_of_distance(kind: str) -> None:
    values = torch.linspace(-1, 1, 4001)
    table = TABLES[kind]
    brute = [min(abs(value - level) for level in table) for value in values.tolist()]
    found = [
        abs(value - table[code]) for value, code in zip(values.tolist(), nearest(values, table).tolist(), strict=True)
    ]
    assert np.allclose(found, brute, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", TABLES)
def test_every_level_is_its_own_code(kind: str) -> None:
    table = torch.tensor(TABLES[kind])
    codes = nearest(table, TABLES[kind])
    assert torch.equal(table[codes.int()], table)


@pytest.mark.parametrize(("shape", "block"), list(product([(1, 1), (3, 21), (63, 50), (96, 33)], [16, 64])))
def test_odd_shapes_against_a_loop(shape: tuple[int, int], block: int) -> None:
    weight = normal(*shape, seed=7)
    stored = nf4.CODES.encode(weight, block)
    count = weight.numel()
    assert stored["codes"].shape == (math.ceil(count / 2),)
    assert stored["scale"].shape == (math.ceil(count / block),)
    found = nf4.CODES.decode(stored | {"levels": torch.tensor(nf4.LEVELS)}, shape, block).reshape(-1).tolist()
    flat = weight.reshape(-1).tolist()
    for start in range(0, count, block):
        piece = flat[start : start + block]
        largest = max(map(abs, piece))
        expected = [min(nf4.LEVELS, key=lambda level, v=value: abs(v / largest - level)) * largest for value in piece]  # type: ignore[misc]
        assert np.allclose(found[start : start + block], expected, rtol=1e-6, atol=0)


def test_zero_blocks_stay_zero() -> None:
    weight = torch.cat((torch.zeros(64), torch.ones(64))).view(2, 64)
    for kind, table in TABLES.items():
        stored = Blocks4(table).encode(weight, 64) | {"levels": torch.tensor(table)}
        assert torch.equal(Blocks4(TABLES[kind]).decode(stored, (2, 64), 64), weight), kind


def test_meta_tensors_give_shapes() -> None:
    stored = nf4.CODES.encode(torch.empty(3, 21, device="meta"), 16)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {"codes": (32,), "scale": (4,)}
    levels = torch.tensor(nf4.LEVELS, device="meta")
    assert nf4.CODES.decode(stored | {"levels": levels}, (3, 21), 16).shape == (3, 21)
