"""What bitsandbytes computes: the right modules, the weights it stands for, and products within their bounds."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from harness.core import catalog
from harness.core.contracts import Arguments, Checkpoint, Method, QuantizedWeight
from harness.inputs.models import sizes
from harness.methods.quantizing import bnb

BNB = ("bnb-int8", "bnb-fp4", "bnb-nf4", "bnb-nf4-dq")
SIZES = {"num_hidden_layers": 2, "vocab_size": 96}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, hidden_size=64, intermediate_size=192, num_attention_heads=4),
    "gpt2": lambda: GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=32),
}
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = (1, 9)  # of activations: decode and prefill take different kernels
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half the step at 1


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random model saved as a plain folder."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]()).save_pretrained(directory)
    return Checkpoint(f"path:{directory}", directory, revision="")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with bnb.quiet():
        yield


def load(checkpoint: Checkpoint, name: str, dtype: str = "fp32", **values: Any) -> tuple[Method, nn.Module]:
    method = catalog.methods()[name]
    defaults = {key: parameter.default for key, parameter in method.parameters.items()}
    return method, method.load(checkpoint, Arguments(dtype, values=defaults | values), "cpu")


def plain(checkpoint: Checkpoint) -> dict[str, nn.Module]:
    return dict(AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32).named_modules())


@pytest.mark.parametrize("name", BNB)
def test_the_targets_are_quantized_and_nothing_else(checkpoint: Checkpoint, name: str) -> None:
    method, model = load(checkpoint, name)
    modules = plain(checkpoint)
    expected = [key for key, module in modules.items() if isinstance(module, (nn.Linear, Conv1D)) and key != "lm_head"]
    weights = list(method.quantized(model))
    assert [weight.name for weight in weights] == expected == method.targets(modules[""], Arguments("fp32"))
    assert [weight.kind for weight in weights] == [type(modules[key]).__name__ for key in expected]
    assert type(model.lm_head) is nn.Linear
    assert not model.training
    assert model.lm_head.weight.requires_grad  # as from_pretrained gives it


@pytest.mark.parametrize(("name", "limit"), list(zip(BNB, (0.01, 0.14, 0.11, 0.11), strict=True)))
def test_dequantized_weights_lie_near_the_originals_in_their_layout(
    checkpoint: Checkpoint, name: str, limit: float
) -> None:
    """Relative error of N(0, 1) weights: int8 about 0.007, FP4 about 0.12, NF4 about 0.09."""
    method, model = load(checkpoint, name)
    modules: dict[str, Any] = plain(checkpoint)
    for weight in method.quantized(model):
        original = modules[weight.name].weight  # a Linear's (out, in), a Conv1D's (in, out)
        found = weight.dequantize()
        assert found.shape == original.shape
        assert limit / 3 < ((found - original).norm() / original.norm()).item() < limit, weight.name


def test_it_is_the_model_that_transformers_defaults_give(checkpoint: Checkpoint) -> None:
    """Our explicit skip list names what transformers would have skipped by itself, and no option differs."""
    ids = torch.arange(16)[None]
    _, ours = load(checkpoint, "bnb-nf4-dq")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint.directory, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    ).eval()
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=0)
    assert [(name, type(module)) for name, module in ours.named_modules()] == [
        (name, type(module)) for name, module in theirs.named_modules()
    ]


def matrix(weight: QuantizedWeight) -> torch.Tensor:
    """What the weight stands for as (out, in), whatever the layout, in double precision."""
    dense = weight.dequantize().double()
    return dense.T if weight.kind == "Conv1D" else dense


def gaussian(rows: int, inputs: int) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize(
    ("dtype", "compute"), [("fp32", "dtype"), ("bf16", "dtype"), ("fp16", "dtype"), ("fp16", "fp32")]
)
@pytest.mark.parametrize("name", BNB[1:])
def test_4bit_products_equal_those_of_the_dequantized_weight(
    checkpoint: Checkpoint, name: str, dtype: str, compute: str
) -> None:
    """Input, weight, sum and output are each rounded once in the coarser of the dtypes involved."""
    method, model = load(checkpoint, name, dtype, compute=compute)
    # read before the first forward
    weights = {weight.name: matrix(weight) for weight in method.quantized(model)}
    for (key, weight), rows in itertools.product(weights.items(), ROWS):
        module: Any = model.get_submodule(key)
        x = gaussian(rows, weight.shape[1]).to(TORCH[dtype])
        with torch.inference_mode():
            found = module(x).double()  # (rows, out)
        bias = 0 if module.bias is None else module.bias.double()
        packed = getattr(module.weight.quant_state, "packing_format_for_cpu", False)  # then bf16, scales too
        unit = max(ROUNDOFF[torch.bfloat16 if packed else TORCH[dtype]], ROUNDOFF[module.compute_dtype])
        size = x.double().abs() @ weight.abs().T + abs(bias)  # (rows, out)
        error = (found - (x.double() @ weight.T + bias)).abs()
        assert (error <= (5 if packed else 4) * unit * size + 2.0**-24 * weight.shape[1]).all(), key


def int8_bound(x: torch.Tensor, weight: torch.Tensor, bias: Any, threshold: float) -> torch.Tensor:
    """The bound of harness/methods/bitsandbytes.py, in double precision. x: (rows, in), weight: (out, in)."""
    unit = ROUNDOFF[x.dtype]
    a = x.half().double()  # (rows, in)
    beyond = a.abs() >= threshold if threshold else torch.zeros_like(a, dtype=torch.bool)
    outlier = beyond.any(dim=0)  # (in,)
    s = a.abs().masked_fill(beyond, 0).amax(dim=1, keepdim=True)  # (rows, 1)
    inside = weight.abs()[:, ~outlier].sum(dim=1)  # A, (out,)
    size = x.double().abs() @ weight.abs().T + s * inside + abs(bias)  # B, (rows, out)
    bound: torch.Tensor = (s / 254 + 2.0**-25) * inside + (2.0**-11 + 2e-5 + 4 * unit) * size  # (rows, out)
    return bound


def spiked(rows: int, inputs: int) -> torch.Tensor:
    """Gaussian activations with two outlier columns, one beyond the threshold in a single row, one in all."""
    x = gaussian(rows, inputs)
    x[0, 3], x[:, 5] = 40.0, -20.0
    return x


@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_int8_products_lie_within_the_derived_bound(checkpoint: Checkpoint, dtype: str, threshold: float) -> None:
    method, model = load(checkpoint, "bnb-int8", dtype, threshold=threshold)
    for weight, rows in itertools.product(method.quantized(model), ROWS):
        module: Any = model.get_submodule(weight.name)
        dense = matrix(weight)  # (out, in)
        x = spiked(rows, dense.shape[1]).to(TORCH[dtype])
        bias = 0 if module.bias is None else module.bias.double()
        with torch.inference_mode():
            error = (module(x).double() - (x.double() @ dense.T + bias)).abs()  # (rows, out)
        assert (error <= int8_bound(x, dense, bias, threshold)).all(), weight.name


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_int8_errors_are_as_large_as_rounding_makes_them(checkpoint: Checkpoint, threshold: float) -> None:
    """A rounding error is uniform over a step s / 127, so that its RMS is s / 127 / sqrt(12) * ||W||_2: no less."""
    method, model = load(checkpoint, "bnb-int8", threshold=threshold)
    for weight in method.quantized(model):
        module: Any = model.get_submodule(weight.name)
        dense = matrix(weight)  # (out, in)
        x = spiked(64, dense.shape[1])
        with torch.inference_mode():
            error = module(x).double() - x.double() @ dense.T - (0 if module.bias is None else module.bias.double())
        kept = x.clone() if not threshold else x.masked_fill(x.abs() >= threshold, 0)
        inside = dense if not threshold else dense[:, (x.abs() < threshold).all(dim=0)]
        s = kept.abs().amax(dim=1, keepdim=True).double()  # (rows, 1)
        expected = s / 127 / 12**0.5 * inside.norm(dim=1)  # (rows, out)
        assert 0.9 < (error / expected).square().mean().sqrt().item() < 1.1, weight.name


def test_int8_weight_reads_the_same_before_and_after_a_forward(checkpoint: Checkpoint) -> None:
    method, model = load(checkpoint, "bnb-int8")
    before = [(weight.storage, weight.dequantize()) for weight in method.quantized(model)]
    whole = sizes.storage_bytes(model)
    with torch.inference_mode():
        model(torch.arange(16)[None])
    after = [(weight.storage, weight.dequantize()) for weight in method.quantized(model)]
    for (storage, weight), (storage_after, weight_after) in zip(before, after, strict=True):
        assert storage == storage_after
        torch.testing.assert_close(weight, weight_after, rtol=0, atol=0)
    assert sizes.storage_bytes(model) == whole


def test_4bit_weight_reads_the_same_before_and_after_a_forward(checkpoint: Checkpoint) -> None:
    """To bf16's precision of the scales, where the processor made the library repack."""
    method, model = load(checkpoint, "bnb-nf4-dq")
    before = [weight.dequantize() for weight in method.quantized(model)]
    with torch.inference_mode():
        model(torch.arange(16)[None])
    for weight, old in zip(method.quantized(model), before, strict=True):
        torch.testing.assert_close(weight.dequantize(), old, rtol=2.0**-8, atol=0)


def test_int8_depends_on_the_other_rows_and_4bit_does_not() -> None:
    """Why LLM.int8 is measured at batch 1: a neighbour's outlier takes a column out of the 8-bit product."""
    rows = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    neighbour = rows.clone()
    neighbour[1, 7] = 30.0
    int8 = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False, threshold=6.0).to("cpu").eval()
    nf4 = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    nf4 = nf4.to("cpu").eval()
    with torch.inference_mode():
        assert not torch.equal(int8(rows)[0], int8(neighbour)[0])
        assert torch.equal(nf4(rows)[0], nf4(neighbour)[0])


def test_layout_of_a_conv1d_is_its_own() -> None:
    conv = Conv1D(32, 64)  # weight (64, 32) as (in, out)
    module: Any = bnb.sketched(conv.to("meta"), bnb.options(bnb.Format("llm_int8"), Arguments("fp32"), []))
    assert (module.in_features, module.out_features) == (64, 32)
    assert module.weight.shape == (32, 64)
