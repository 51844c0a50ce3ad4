"""Products with int8 codes: within their stated roundings, and untouched where a processor lacks the instructions."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numba.core.caching
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from harness.core.contracts import Arguments, Method, Scope
from harness.core.errors import HarnessError
from harness.core.specification import parse
from harness.inputs.models import sizes as memory
from harness.methods import (
    absmax_int8,
    absmax_int8_tensor,
    absmax_int8_w8a8,
    fp4,
    linear_int4,
    linear_int4_affine,
    nf4,
    zeropoint_int8,
)
from harness.methods.quantizing import compiled, cpu, encode, int8, products, stored
from harness.methods.quantizing.arguments import resolve

SHAPES = [
    (1, 64, 96),
    (3, 50, 63),
    (2, 48, 50),
    (1, 40, 32),
    (4, 576, 32),
    (8, 576, 32),
    (9, 576, 32),
    (130, 63, 50),
]  # rows, in, out
TILED, PLAIN = frozenset({"avx512f", "amx_bf16", "amx_int8"}), frozenset({"avx512f"})


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    x = normal(rows, inputs, seed=1) * torch.logspace(0, 2, inputs)
    return x, absmax_int8.CODES.encode(normal(outputs, inputs, seed=2)), normal(outputs, seed=3)


def in_double(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().T + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_bf16_products_are_within_their_roundings(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, stored, bias = case(rows, inputs, outputs)
    x = x.to(dtype)
    weight = absmax_int8.CODES.decode(stored, (outputs, inputs))
    found = int8.in_bf16(x[None], stored["codes"], stored["scale"], bias)
    assert (found.shape, found.dtype) == ((1, rows, outputs), dtype)
    wanted = in_double(x, weight, bias)
    sizes = x.double().abs() @ weight.double().abs().T  # an activation, a sum and in bf16 the result: 2^-9 each
    allowed = 2.0**-9 * 1.1 * (2 * sizes + wanted.abs()) + 1e-5 * sizes
    assert bool(((found[0].double() - wanted).abs() <= allowed).all())


def test_a_scale_for_the_whole_tensor_serves_too() -> None:
    x, weight, bias = normal(9, 32), normal(16, 32, seed=4), normal(16, seed=5)
    stored = absmax_int8_tensor.CODES.encode(weight)
    found = int8.in_bf16(x, stored["codes"], stored["scale"], bias)
    wanted = in_double(x, absmax_int8_tensor.CODES.decode(stored, (16, 32)), bias)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("flags", [PLAIN, TILED, frozenset({"avx512f", "avx512_vnni"})], ids=["plain", "amx", "vnni"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_int8_products_are_exact_sums_of_rounded_activations(
    rows: int, inputs: int, outputs: int, flags: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "cpu_flags", lambda: flags)
    x, stored, bias = case(rows, inputs, outputs)
    x[0] = 0
    found = int8.in_int8(x, stored["codes"], stored["scale"], bias)
    step = x.abs().amax(1, keepdim=True) / 127
    whole = (x / step.clamp_min(2.0**-126)).round()
    assert bool(((whole * step - x).abs() <= step / 2 * 1.001).all())
    sums = whole.long() @ stored["codes"].long().T
    wanted = sums.double() * step.double() * stored["scale"].double().T + bias.double()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[0], bias)


def test_int8_products_of_one_row_do_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    x, stored, bias = case(40, 64, 96)
    together = int8.in_int8(x, stored["codes"], stored["scale"], bias)
    alone = torch.cat([int8.in_int8(row[None], stored["codes"], stored["scale"], bias) for row in x])
    assert torch.equal(together, alone)
    monkeypatch.setattr(cpu, "cpu_flags", lambda: PLAIN)  # and not on the processor
    assert torch.equal(together, int8.in_int8(x, stored["codes"], stored["scale"], bias))


def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("method", [absmax_int8.METHOD, absmax_int8_tensor.METHOD], ids=lambda method: method.name)
def test_fp32_is_multiplied_in_fp32_on_every_processor(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(1, 20)[None]
    model, plain = tiny(), tiny()
    method.sketch(model, Arguments("fp32", Scope(), {}))
    for weight in method.quantized(model):
        plain.get_submodule(weight.name).weight.copy_(weight.dequantize())
    wanted = plain(ids).logits
    for flags in (PLAIN, TILED):
        monkeypatch.setattr(cpu, "cpu_flags", lambda flags=flags: flags)
        assert torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize("module", [absmax_int8, absmax_int8_tensor], ids=lambda module: module.METHOD.name)
def test_bf16_products_follow_the_processor_within_their_rounding(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (layer,) = quantized_layers(module.METHOD.name, module.METHOD, nn.Linear(32, 48, bias=False))
    x, found = normal(19, 32).bfloat16(), []
    for flags in (PLAIN, TILED):
        monkeypatch.setattr(cpu, "cpu_flags", lambda flags=flags: flags)
        found.append(layer(x).float())
    plain, tiled = found
    assert not torch.equal(plain, tiled)
    torch.testing.assert_close(tiled, plain, rtol=0.05, atol=0.05 * float(plain.std()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_only_bf16_in_tiles_is_quick(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, wanted in ((TILED, dtype == torch.bfloat16), (PLAIN, False), (frozenset({"avx512_bf16"}), False)):
        monkeypatch.setattr(cpu, "cpu_flags", lambda flags=flags: flags)
        assert products.quick(torch.zeros(1, dtype=dtype)) is wanted
    assert not products.quick(torch.zeros(1, dtype=dtype, device="meta"))


@pytest.mark.parametrize("method", [absmax_int8.METHOD, absmax_int8_w8a8.METHOD], ids=lambda method: method.name)
def test_nothing_unpacked_is_kept(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cpu_flags", lambda: TILED)
    model: nn.Module = tiny()
    method.sketch(model, Arguments("fp32", Scope(), {}))
    before = memory.measure(model)
    model(torch.arange(1, 20)[None])
    assert memory.measure(model) == before


def test_the_lossier_method_says_so() -> None:
    assert "activations" in absmax_int8_w8a8.METHOD.summary
    assert not absmax_int8_w8a8.METHOD.core
    assert absmax_int8_w8a8.METHOD.batch_invariant


def quantized_layers(text: str, method: Method, *layers: nn.Module) -> nn.ModuleList:
    """These layers under a method, as if they were a model's."""
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    method.sketch(model.requires_grad_(False), resolve(parse(text), method, "cpu"))
    return model.layers


ROUNDED = [absmax_int8, absmax_int8_tensor, zeropoint_int8, linear_int4, linear_int4_affine, nf4, fp4]


@pytest.mark.parametrize("module", ROUNDED, ids=lambda module: module.METHOD.name)
def test_compute_in_bf16_rounds_activations_weights_and_sums_once_each(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (layer,) = quantized_layers(f"{module.METHOD.name}:compute=bf16", module.METHOD, nn.Linear(64, 48))
    restored, bias = layer.weight, layer.bias
    assert isinstance(restored, torch.Tensor)
    assert isinstance(bias, torch.Tensor)
    for rows in (1, 9):
        x = normal(rows, 64)
        wanted = in_double(x, restored, bias)
        sizes = x.double().abs() @ restored.double().abs().T
        for flags in (PLAIN, frozenset({"avx512_bf16"}), TILED):
            monkeypatch.setattr(cpu, "cpu_flags", lambda flags=flags: flags)
            found = layer(x)
            assert found.dtype == torch.float32
            error = (found.double() - wanted).abs()
            assert bool((error <= 2.0**-9 * 1.1 * (2 * sizes + (wanted - bias).abs()) + 1e-5 * sizes).all())
            assert float(error.max()) > 1e-4  # it is rounded


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("module", ROUNDED, ids=lambda module: module.METHOD.name)
def test_fused_products_of_few_rows_are_those_of_the_dequantized_weight(
    module: ModuleType, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    made = nn.Linear(192, 41) if kind is nn.Linear else Conv1D(41, 192)
    assert isinstance(made.weight, torch.Tensor)
    nn.init.normal_(made.weight, mean=0.3)
    nn.init.normal_(made.bias)
    (layer,) = quantized_layers(f"{module.METHOD.name}:compute=fused", module.METHOD, made)
    assert isinstance(layer, stored.QuantizedLinear)
    assert layer.bias is not None
    wide, bias = layer.store.dequantize().double(), layer.bias.double()
    monkeypatch.setattr(stored.StoredWeight, "dequantize", lambda store: pytest.fail("dequantized"))
    monkeypatch.setattr(int8, "in_bf16", lambda *_: pytest.fail("rounded"))
    for rows in (0, 1, 3, 8):
        for dtype in (torch.float32, torch.bfloat16):
            x = normal(2, rows // 2, 192).to(dtype) if rows == 8 else normal(rows, 192).to(dtype)
            found = layer(x)
            assert (found.shape, found.dtype) == ((*x.shape[:-1], 41), dtype)
            error = (found.double() - (x.double() @ wide.T + bias)).abs()
            sizes = x.double().abs() @ wide.abs().T + bias.abs()
            assert bool((error <= (1e-6 if dtype == torch.float32 else 2.0**-8) * sizes).all())


@pytest.mark.parametrize("module", ROUNDED, ids=lambda module: module.METHOD.name)
def test_the_default_takes_few_rows_of_fp32_by_loops_and_keeps_the_bits_of_all_others(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(cpu, "cpu_flags", lambda: PLAIN)
    layers = quantized_layers(module.METHOD.name, module.METHOD, nn.Linear(192, 41, bias=False))
    (layer,) = layers
    assert isinstance(layer, stored.QuantizedLinear)
    wide = layer.store.dequantize()
    for rows, dtype in ((1, torch.bfloat16), (9, torch.float32), (9, torch.bfloat16), (9, torch.float16)):
        x = normal(rows, 192).to(dtype)
        assert torch.equal(layer(x), torch.nn.functional.linear(x, wide.to(dtype)))
    asked = quantized_layers(f"{module.METHOD.name}:compute=fused", module.METHOD, nn.Linear(192, 41, bias=False))
    asked.load_state_dict(layers.state_dict())
    x = normal(2, 4, 192)
    assert torch.equal(layer(x), asked[0](x))
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad[0, 0], wide.sum(dim=0), rtol=1e-4, atol=1e-4)


def unpacked(layer: nn.Module) -> torch.Tensor:
    """A layer's weight by its fused loops, (out, in): first and last rows, then those between."""
    assert isinstance(layer, stored.QuantizedLinear)
    loops, found = layer.store.loops(), torch.full(layer.store.matrix, torch.nan)
    assert loops is not None
    for rows in (slice(0, 7), slice(30, None), slice(7, 30)):
        loops.unpack(rows.start, found[rows])
    return found


@pytest.mark.parametrize("more", ["", ":block=16", ":block=32"])
@pytest.mark.parametrize("module", ROUNDED, ids=lambda module: module.METHOD.name)
def test_fused_loops_unpack_the_very_weight(module: ModuleType, more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = more if "block" in module.METHOD.parameters else ""
    torch.manual_seed(0)
    made = nn.Linear(192, 41)
    nn.init.normal_(made.weight, mean=0.3)
    (layer,) = quantized_layers(f"{module.METHOD.name}:compute=fused{more}", module.METHOD, made)
    assert isinstance(layer, stored.QuantizedLinear)
    for alone in (0, 2**20):  # shared out between threads, and not
        monkeypatch.setattr(compiled, "SOON", alone)
        assert torch.equal(unpacked(layer), layer.store.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("module", ROUNDED, ids=lambda module: module.METHOD.name)
def test_many_rows_are_multiplied_slab_by_slab(
    module: ModuleType, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    (layer,) = quantized_layers(f"{module.METHOD.name}:compute=fused", module.METHOD, nn.Linear(192, 41, bias=bias))
    assert isinstance(layer, stored.QuantizedLinear)
    x, weight = normal(2, 7, 192).to(dtype), layer.store.dequantize().to(dtype).double()
    wanted = x.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())
    sizes = x.double().abs() @ weight.abs().T + 1
    monkeypatch.setattr(stored.StoredWeight, "dequantize", lambda store: pytest.fail("dequantized"))
    monkeypatch.setattr(cpu, "cpu_flags", lambda: PLAIN)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(dtype)
    for slab in (1, 192 * 7, 192 * 41):
        monkeypatch.setattr(products, "SLAB", slab)
        found = layer(x)
        assert (found.shape, found.dtype) == ((2, 7, 41), dtype)
        error = (found.double() - wanted).abs()
        assert bool((error <= (1e-6 if dtype == torch.float32 else 2.0**-8) * sizes).all())


WITHOUT_REGISTERS = """
import torch
from torch import nn
from harness.methods.quantizing import int4
from test_products import ROUNDED, normal, quantized_layers, unpacked

assert not int4._in_registers()
for module in ROUNDED:
    torch.manual_seed(0)
    (layer,) = quantized_layers(f"{module.METHOD.name}:compute=fused", module.METHOD, nn.Linear(192, 41))
    assert torch.equal(unpacked(layer), layer.store.dequantize()), module.METHOD.name
    x = normal(3, 192)
    assert torch.allclose(layer(x), x @ layer.store.dequantize().T + layer.bias, rtol=1e-4, atol=1e-4)
"""


def test_processors_without_wide_registers_look_levels_up_in_a_table(tmp_path: Path) -> None:
    world = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_REGISTERS], cwd=Path(__file__).parent, env=os.environ | world,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "NumbaWarning" not in ran.stderr  # and the loops are kept
    assert list(tmp_path.rglob("int4._multiply-*.nbc"))


def test_loops_are_compiled_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache function"):
        numba.njit(cache=True)(lambda: None)
    ten: Any = compiled.njit(lambda: 10, cache=True, nogil=True)
    assert ten() == 10


def test_fused_products_depend_neither_on_other_rows_nor_on_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, x = torch.get_num_threads(), normal(8, 192)
    for module in (absmax_int8, zeropoint_int8, nf4, linear_int4_affine):
        torch.manual_seed(0)
        (layer,) = quantized_layers(f"{module.METHOD.name}:compute=fused", module.METHOD, nn.Linear(192, 41))
        found = []
        try:
            for count, alone in ((1, 0), (2, 0), (3, 0), (2, 2**20)):
                torch.set_num_threads(count)
                monkeypatch.setattr(compiled, "ALONE", alone)
                found += [layer(x), torch.cat([layer(row[None]) for row in x])]
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(one, found[0]) for one in found)


def test_blocks_across_rows_are_dequantized_also_where_fused_is_asked_for() -> None:
    for text, module, inputs, rows in (
        ("nf4:block=128", nf4, 192, 9),
        ("nf4:block=128", nf4, 192, 1),
        ("fp4", fp4, 63, 1),
    ):
        found = []
        for more in ("", ":compute=fused"):
            torch.manual_seed(0)
            (layer,) = quantized_layers(text + more, module.METHOD, nn.Linear(inputs, 41))
            found.append(layer(normal(rows, inputs)))
        assert torch.equal(*found)


def test_fused_products_follow_what_is_loaded_into_their_store_and_what_replaces_it() -> None:
    torch.manual_seed(0)
    layers = quantized_layers("nf4:compute=fused", nf4.METHOD, nn.Linear(192, 41), nn.Linear(192, 41))
    first, second, x = layers[0], layers[1], normal(1, 192)
    wanted = second(x)
    assert not torch.equal(first(x), wanted)
    copied = copy.deepcopy(first)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), wanted)
    assert not torch.equal(copied(x), wanted)
    copied.load_state_dict(second.state_dict(), assign=True)
    assert torch.equal(copied(x), wanted)


def test_not_a_number_in_a_row_reaches_every_fused_product_of_it_and_no_other() -> None:
    for module in (absmax_int8, nf4):
        (layer,) = quantized_layers(f"{module.METHOD.name}:compute=fused", module.METHOD, nn.Linear(192, 41))
        x = normal(3, 192)
        x[1, 5] = torch.nan
        assert layer(x).isnan().all(dim=1).tolist() == [False, True, False]


def test_compute_in_bf16_changes_nothing_where_all_is_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cpu_flags", lambda: TILED)
    x, found = normal(9, 64).bfloat16(), []
    for text in ("nf4:dtype=bf16", "nf4:dtype=bf16:compute=bf16"):
        torch.manual_seed(0)
        (layer,) = quantized_layers(text, nf4.METHOD, nn.Linear(64, 48).bfloat16())
        found.append(layer(x))
    assert torch.equal(*found)


@pytest.mark.parametrize("module", ROUNDED, ids=lambda module: module.METHOD.name)
def test_a_weight_is_quantized_in_parts_as_it_is_whole(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for part in (2**18, 300):
        monkeypatch.setattr(encode, "PART", part)
        torch.manual_seed(0)
        layers = quantized_layers(module.METHOD.name, module.METHOD, nn.Linear(48, 41), Conv1D(47, 48))
        found.append(layers.state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


COMPILED = [absmax_int8, absmax_int8_w8a8, linear_int4, nf4, fp4]


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lying", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("module", COMPILED, ids=lambda module: module.METHOD.name)
def test_compiled_loops_quantize_to_the_bits_of_the_definition(
    module: ModuleType, lying: torch.dtype, kept: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "PART", 300)  # one row
    weight = normal(70, 192).mul_(0.1)
    weight[3], weight[4], weight[5, ::2] = 0, 1e-45, -1e-6  # no scale, one too small to divide by, and beside zeros
    weight[6] = torch.arange(192) / 127 - 0.5  # between two levels
    weight[7, 0] = -3.4e4  # nearly all that fp16 holds
    (layer,) = quantized_layers(module.METHOD.name, module.METHOD, nn.Linear(192, 70))
    assert isinstance(layer, stored.QuantizedLinear)
    recipe = layer.store.recipe
    monkeypatch.setattr(encode, "_in_parts", lambda *_: pytest.fail("not by a loop"))
    for rows in (weight.to(lying), weight.T.contiguous().to(lying).T):
        wanted = recipe.codes.encode(rows.to(kept).float().contiguous(), **recipe.values)
        found = encode.quantize(recipe, rows, kept)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        assert all(found[name].shape == tensor.shape for name, tensor in wanted.items())


def test_the_first_loop_leaves_torch_its_number_of_threads() -> None:
    """Numba's launch, once a process, sets the number that OpenMP gives torch too."""
    script = """
import torch
torch.set_num_threads(1)
assert torch.get_num_threads() == 1  # asked first: torch sets its own number at the first question of a thread
from harness.methods.quantizing import compiled
assert compiled.threads(1) == 1
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""
    world = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", script], env=world, check=True)


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("module", COMPILED, ids=lambda module: module.METHOD.name)
def test_compiled_loops_pass_over_nothing_that_is_not_finite(
    module: ModuleType, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "PART", 300)
    made = nn.Linear(192, 41)
    made.weight.data[17, 100] = value
    with pytest.raises(HarnessError, match="1 non-finite values in its weight"):
        quantized_layers(module.METHOD.name, module.METHOD, made)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "capability", "wanted"),
    [
        (17, 64, 48, (7, 5), True),
        (16, 64, 48, (9, 0), False),
        (17, 60, 48, (9, 0), False),
        (17, 64, 50, (9, 0), False),
        (17, 64, 48, (7, 0), False),
    ],
)
def test_cuda_multiplies_int8_only_in_shapes_that_it_takes(
    rows: int, inputs: int, outputs: int, capability: tuple[int, int], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    there: Any = SimpleNamespace(is_cuda=True, shape=(rows, inputs), device="cuda")
    assert int8.multiplies_int8(there, torch.zeros(outputs, inputs, dtype=torch.int8)) is wanted
