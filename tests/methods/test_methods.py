"""Every weight method: by hand, against an independent quantizer in float64, and as a module's forward."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.core.contracts import Method
from harness.methods import absmax_int8, absmax_int8_tensor, fp4, linear_int4, linear_int4_affine, nf4, zeropoint_int8
from harness.methods.quantizing import stored
from harness.methods.quantizing.codes import Codes, Recipe
from harness.methods.references import METHODS as REFERENCES

MODULES: dict[str, Any] = {
    module.METHOD.name: module
    for module in (absmax_int8, absmax_int8_tensor, zeropoint_int8, linear_int4, linear_int4_affine, nf4, fp4)
}
BLOCKED = [name for name, module in MODULES.items() if module.METHOD.bits == 4]
SHAPES = [(96, 64), (63, 50), (96, 63), (1, 1), (5, 1), (1, 33)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values(name: str, block: int = 64) -> dict[str, int]:
    return {"block": block} if name in BLOCKED else {}


def tables(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(levels) for key, levels in codes_of(name).tables.items()}


def codes_of(name: str) -> Codes:
    codes: Codes = MODULES[name].CODES
    return codes


def round_trip(name: str, weight: torch.Tensor, block: int = 64) -> torch.Tensor:
    kept = codes_of(name).encode(weight, **values(name, block))
    return codes_of(name).decode(kept | tables(name), (weight.shape[0], weight.shape[1]), **values(name, block))


def recipe(name: str, block: int = 64) -> Recipe:
    return Recipe(name, codes_of(name), values(name, block))


# --- an independent quantizer, row by row in float64 ------------------------------------------------------------


def rounded(row: NDArray[np.float64], step: float, low: int, high: int) -> NDArray[np.float64]:
    return np.asarray(np.clip(np.round(row / step), low, high) * step if step else row * 0)


def zero_pointed(row: NDArray[np.float64]) -> NDArray[np.float64]:
    step = (row.max() - row.min()) / 255 or abs(row.min()) or 1.0
    zero_point = -128 - np.round(row.min() / step)
    return np.asarray((np.clip(np.round(row / step) + zero_point, -128, 127) - zero_point) * step)


def affine(row: NDArray[np.float64]) -> NDArray[np.float64]:
    step = (row.max() - row.min()) / 15
    return np.asarray(row.min() + rounded(row - row.min(), step, 0, 15))


def to_levels(levels: tuple[float, ...]) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    table = np.array(levels)

    def quantize(row: NDArray[np.float64]) -> NDArray[np.float64]:
        largest = np.abs(row).max()
        return table[np.abs(row[:, None] / largest - table).argmin(axis=1)] * largest if largest else row

    return quantize


ROWS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "absmax-int8": lambda row: rounded(row, np.abs(row).max() / 127, -127, 127),
    "absmax-int8-tensor": lambda row: rounded(row, np.abs(row).max() / 127, -127, 127),
    "zeropoint-int8": zero_pointed,
    "linear-int4": lambda row: rounded(row, np.abs(row).max() / 7, -7, 7),
    "linear-int4-affine": affine,
    "nf4": to_levels(nf4.LEVELS),
    "fp4": to_levels(fp4.LEVELS),
}


def independent(name: str, weight: torch.Tensor, block: int) -> NDArray[np.float64]:
    array = weight.double().numpy()
    if name == "absmax-int8-tensor":
        return ROWS[name](array.reshape(-1)).reshape(array.shape)
    if name in BLOCKED:
        parts = [array.reshape(-1)[start : start + block] for start in range(0, array.size, block)]
        return np.concatenate([ROWS[name](part) for part in parts]).reshape(array.shape)
    return np.stack([ROWS[name](row) for row in array])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_against_the_independent_quantizer(name: str, shape: tuple[int, int]) -> None:
    weight = normal(*shape, seed=sum(shape))
    found, expected = round_trip(name, weight), independent(name, weight, 64)
    close = np.isclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert close.mean() >= 1 - 2e-4  # a value half-way between two codes may round apart in fp32 and float64
    assert close.all() or weight.numel() > 3000


# --- by hand ----------------------------------------------------------------------------------------------------


def test_absmax_int8_by_hand() -> None:
    kept = absmax_int8.CODES.encode(torch.tensor([[1.0, -0.5, 0.25], [127.0, 2.5, 3.5], [0, 0, 0]]))
    assert kept["codes"].tolist() == [[127, -64, 32], [127, 2, 4], [0, 0, 0]]  # ties to even
    assert kept["codes"].dtype == torch.int8
    assert torch.equal(kept["scale"], torch.tensor([[1 / 127], [1.0], [0.0]]))


def test_absmax_int8_tensor_by_hand() -> None:
    kept = absmax_int8_tensor.CODES.encode(torch.tensor([[1.0, -0.5], [254.0, 3.0]]))
    assert kept["codes"].tolist() == [[0, 0], [127, 2]]  # 0.5, -0.25 and 1.5, rounded to even
    assert kept["scale"].item() == 2.0


def test_zeropoint_int8_by_hand() -> None:
    kept = zeropoint_int8.CODES.encode(torch.tensor([[-1.0, 0.0, 254.0], [10.0, 20.0, 265.0], [3.0, 3.0, 3.0]]))
    assert kept["scale"].flatten().tolist() == [1.0, 1.0, 3.0]
    assert kept["zero_point"].flatten().tolist() == [-127.0, -138.0, -129.0]
    assert kept["codes"].tolist() == [[-128, -127, 127], [-128, -118, 127], [-128, -128, -128]]


def test_linear_int4_by_hand() -> None:
    kept = linear_int4.CODES.encode(torch.tensor([[7.0, -7.0, 2.4, 0.0, -0.6]]), 16)
    assert kept["codes"].tolist() == [0xF1, 0xA8, 0x70]  # 15 1, 10 8, 7
    assert kept["scale"].tolist() == [1.0]


def test_linear_int4_affine_by_hand() -> None:
    kept = linear_int4_affine.CODES.encode(torch.tensor([[-1.0, 14.0, 2.4, 0.0, -0.6, 5.0]]), 16)
    assert kept["codes"].tolist() == [0x0F, 0x31, 0x06]
    assert (kept["scale"].tolist(), kept["minimum"].tolist()) == ([1.0], [-1.0])


def test_nf4_and_fp4_by_hand() -> None:
    weight = torch.tensor([[2.0, -2.0, 0.0, 0.9]])  # 0.9 / 2 = 0.45: 0.4407 of NF4 (code 12), 0.5 of FP4 (code 5)
    assert nf4.CODES.encode(weight, 16)["codes"].tolist() == [0xF0, 0x7C]
    assert fp4.CODES.encode(weight, 16)["codes"].tolist() == [0x3B, 0x05]
    torch.testing.assert_close(round_trip("nf4", weight), torch.tensor([[2.0, -2.0, 0.0, 2 * 0.44070982933044434]]))
    assert round_trip("fp4", weight).tolist() == [[2.0, -2.0, 0.0, 1.0]]


# --- properties -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("level", [0.0, 3.0, -1e-3, 1e-42])
def test_constant_rows(name: str, level: float) -> None:
    weight = torch.full((3, 50), level)
    found = round_trip(name, weight)
    torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-41)
    if not level:
        assert torch.equal(found, weight)


@pytest.mark.parametrize(
    "name", ["absmax-int8", "absmax-int8-tensor", "zeropoint-int8", "linear-int4", "linear-int4-affine"]
)
def test_error_is_at_most_half_a_step(name: str) -> None:
    weight = normal(64, 128, seed=2) * torch.logspace(-3, 3, 64)[:, None] + 0.3
    scale = codes_of(name).encode(weight, **values(name))["scale"]
    step = scale.repeat_interleave(64).view(64, 128) if name in BLOCKED else scale
    error = (round_trip(name, weight) - weight).abs()
    assert bool((error <= step * 0.5 * (1 + 1e-4) + weight.abs() * 1e-6).all())


def test_rows_far_from_zero_keep_their_precision() -> None:
    weight = 1000 + normal(4, 100) * 1e-2  # a zero point far beyond int8
    assert (round_trip("zeropoint-int8", weight) - weight).abs().max() < 2e-4  # half of 0.06 / 255, and fp32 at 1000


def test_more_bits_err_less() -> None:
    weight = normal(256, 256, seed=4)
    error = {name: (round_trip(name, weight) - weight).square().mean().item() for name in MODULES}
    eights = [error[name] for name in MODULES if name not in BLOCKED]
    assert max(eights) < min(error[name] for name in BLOCKED) / 20
    assert error["absmax-int8"] < error["absmax-int8-tensor"]
    assert error["nf4"] < error["fp4"]
    assert error["linear-int4-affine"] < error["linear-int4"]


@pytest.mark.parametrize("name", BLOCKED)
def test_smaller_blocks_err_less(name: str) -> None:
    weight = normal(256, 256, seed=6)
    errors = [(round_trip(name, weight, block) - weight).square().mean().item() for block in (16, 64, 256, 1024)]
    assert errors == sorted(errors)


def test_an_affine_grid_of_32_is_reproduced_by_blocks_of_32_only() -> None:
    """GGUF's Q4_1: w = d q + m with d and m in fp16, codes 0 and 15 both used."""
    generator = torch.Generator().manual_seed(8)
    codes = torch.randint(0, 16, (640, 32), generator=generator)
    codes[:, 0], codes[:, 31] = 0, 15
    step = (torch.rand(640, 1, generator=generator) * 0.1 + 0.01).half().float()
    minimum = (torch.randn(640, 1, generator=generator) * 0.5).half().float()
    weight = (codes * step + minimum).view(80, 256)
    largest = weight.view(640, 32).abs().amax(1, keepdim=True)

    def error(block: int) -> float:
        difference = round_trip("linear-int4-affine", weight, block) - weight
        return float((difference.view(640, 32).abs() / largest).max())

    assert error(32) < 1e-6
    assert error(64) > 1e-2
    assert linear_int4_affine.METHOD.grid == "affine4:32"


# --- as modules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (63, 50), (50, 63)])
@pytest.mark.parametrize("name", MODULES)
def test_forward_is_the_product_with_the_dequantized_weight(
    name: str, outputs: int, inputs: int, kind: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(outputs)
    layer: Any = nn.Linear(inputs, outputs) if kind == "Linear" else Conv1D(outputs, inputs)
    nn.init.normal_(layer.bias)
    model = nn.Sequential(layer).to(dtype)
    before = layer.weight.detach().clone()
    stored.apply(model, recipe(name), ["0"])
    weight = next(iter(stored.weights(model))).dequantize()
    assert weight.shape == before.shape
    assert weight.dtype == torch.float32
    matrix = weight.T if kind == "Linear" else weight  # (in, out)
    x = normal(2, 7, inputs, seed=1).to(dtype)
    exact = x.double() @ matrix.to(dtype).double() + layer.bias.double()
    found = model(x)
    assert found.dtype == dtype
    # fp32 sums of `inputs` terms; bf16 keeps 8 bits of the result
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
    assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max()
    unquantized = x.double() @ (before.T if kind == "Linear" else before).double() + layer.bias.double()
    assert (exact - unquantized).abs().mean() < 0.2 * unquantized.abs().mean()


@pytest.mark.parametrize("name", MODULES)
def test_codes_are_really_packed(name: str) -> None:
    kept = codes_of(name).encode(normal(63, 51), **values(name))
    count = 63 * 51
    assert kept["codes"].element_size() == 1
    assert kept["codes"].numel() == (count if MODULES[name].METHOD.bits == 8 else (count + 1) // 2)
    assert all(tensor.dtype == torch.float32 for key, tensor in kept.items() if key != "codes")


@pytest.mark.parametrize("name", MODULES)
def test_meta_tensors_give_the_same_shapes_and_types(name: str) -> None:
    codes = codes_of(name)
    real = codes.encode(normal(63, 51), **values(name))
    meta = codes.encode(torch.empty(63, 51, device="meta"), **values(name))
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in meta.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in real.items()
    }
    levels = {key: tensor.to("meta") for key, tensor in tables(name).items()}
    assert codes.decode(meta | levels, (63, 51), **values(name)).shape == (63, 51)


@pytest.mark.parametrize("name", MODULES)
def test_dequantizing_leaves_what_is_stored_alone(name: str) -> None:
    kept = codes_of(name).encode(normal(32, 32), **values(name)) | tables(name)
    before = {key: tensor.clone() for key, tensor in kept.items()}
    first, second = (codes_of(name).decode(kept, (32, 32), **values(name)) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(kept[key], tensor) for key, tensor in before.items())


def test_declarations() -> None:
    every: list[Method] = [module.METHOD for module in MODULES.values()]
    assert all(method.scoped and method.core and not method.dtype and method.batch_invariant for method in every)
    assert {method.name for method in every if "block" in method.parameters} == set(BLOCKED)
    assert [(method.name, method.dtype, method.bits, method.scoped) for method in REFERENCES] == [
        ("fp32", "fp32", 32, False),
        ("bf16", "bf16", 16, False),
        ("fp16", "fp16", 16, False),
    ]


def test_importing_the_methods_and_resolving_imports_no_torch() -> None:
    names = ", ".join(itertools.chain((name.replace("-", "_") for name in MODULES), ("references",)))
    code = f"import sys; from harness.methods.quantizing import arguments; from harness.methods import {names}; "
    subprocess.run([sys.executable, "-c", code + "assert not {'torch', 'transformers'} & set(sys.modules)"], check=True)
