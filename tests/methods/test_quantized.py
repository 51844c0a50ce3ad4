"""Modules that hold codes: replacing, tying, saving, moving, counting, refusing."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from harness.core.contracts import Arguments, Checkpoint, Method, Scope
from harness.core.errors import HarnessError
from harness.inputs import models
from harness.inputs.models import sizes
from harness.methods import absmax_int8, linear_int4_affine, nf4, zeropoint_int8
from harness.methods.quantizing import cpu, stored
from harness.methods.quantizing.codes import Functions, Recipe
from harness.methods.quantizing.int4 import BLOCK
from harness.methods.quantizing.int8 import Rows8
from harness.methods.quantizing.stored import KeepsDtype, QuantizedLinear, StoredWeight
from harness.methods.quantizing.weight_method import weight_method
from harness.methods.references import METHODS as REFERENCES

IDS = torch.arange(2, 12)[None]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor whose products are those with the dequantized weight (others: tests/methods/test_products.py)."""
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"avx512f"}))


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_head=4, n_layer=2, n_positions=16, initializer_range=0.1)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def arguments(part: str = "linear", dtype: str = "fp32", **values: int) -> Arguments:
    return Arguments(dtype, Scope(part), values)


def sketched(model: Any, method: Method, part: str = "linear") -> Any:
    values = {name: parameter.default for name, parameter in method.parameters.items()}
    method.sketch(model, Arguments("fp32", Scope(part), values))
    return model


def dequantized_copy(model: Any, method: Method, part: str) -> tuple[Any, Any]:
    """(quantized, the original with its weights overwritten by what the codes stand for)."""
    plain, model = model, sketched(copy.deepcopy(model), method, part)
    for weight in method.quantized(model):
        plain.get_submodule(weight.name).weight.copy_(weight.dequantize())
    return model, plain


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("part", ["linear", "all"])
@pytest.mark.parametrize("method", [absmax_int8.METHOD, nf4.METHOD], ids=lambda method: method.name)
def test_a_quantized_model_is_the_model_with_dequantized_weights(build: Any, part: str, method: Method) -> None:
    original = build()
    reference = original(IDS).logits
    model, plain = dequantized_copy(original, method, part)
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)
    assert (model(IDS).logits - reference).abs().max() > 1e-4  # something was quantized


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("method", [zeropoint_int8.METHOD, linear_int4_affine.METHOD, nf4.METHOD], ids=lambda m: m.name)
@pytest.mark.parametrize("part", ["mlp", "all"])
def test_sketched_bytes_are_loaded_bytes(build: Any, method: Method, part: str) -> None:
    model = sketched(build(), method, part)
    with torch.device("meta"):
        sketch = AutoModelForCausalLM.from_config(model.config)
    sketched(sketch, method, part)
    assert sizes.measure(sketch) == sizes.measure(model)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in sketch.state_dict().items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()
    }
    assert [(w.name, w.kind, w.elements, w.storage) for w in method.quantized(sketch)] == [
        (w.name, w.kind, w.elements, w.storage) for w in method.quantized(model)
    ]


def test_bytes_counted_by_hand() -> None:
    model = sketched(gpt2(), nf4.METHOD, "attention")
    found = list(nf4.METHOD.quantized(model))
    assert [(w.name, w.kind, w.elements) for w in found] == [
        ("transformer.h.0.attn.c_attn", "Conv1D", 3072),
        ("transformer.h.0.attn.c_proj", "Conv1D", 1024),
        ("transformer.h.1.attn.c_attn", "Conv1D", 3072),
        ("transformer.h.1.attn.c_proj", "Conv1D", 1024),
    ]
    table = 16 * 4  # one fp32 table a model, with the first weight
    assert [w.storage for w in found] == [table + 3072 // 2 + 48 * 4, 512 + 16 * 4, 3072 // 2 + 48 * 4, 512 + 16 * 4]
    assert sizes.measure(gpt2())["memory.storage"] - sizes.measure(model)["memory.storage"] == 4 * 8192 - sum(
        w.storage for w in found
    )


@pytest.mark.parametrize("method", [absmax_int8.METHOD, nf4.METHOD], ids=lambda method: method.name)
def test_tied_weights_stay_tied_and_count_once(method: Method) -> None:
    model = sketched(llama(), method, "all")
    assert model.lm_head.store is model.model.embed_tokens.store
    assert isinstance(model.lm_head, QuantizedLinear)
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    names = [weight.name for weight in method.quantized(model)]
    assert "model.embed_tokens" in names
    assert "lm_head" not in names
    weights = sum(weight.storage for weight in method.quantized(model))
    assert sizes.measure(model)["memory.storage"] == weights + sum(
        buffer.nbytes for name, buffer in model.named_buffers() if "inv_freq" in name
    )


def test_tables_are_one_tensor_for_the_whole_model_after_a_move_too() -> None:
    model = sketched(llama(), nf4.METHOD)
    before = sizes.measure(model)
    model.to("cpu").to(torch.float64)
    levels = [module.levels for module in model.modules() if isinstance(module, stored.Tables)]
    assert len(levels) == 1
    assert before["memory.storage"] - before["memory.parameters"] == sum(
        tensor.nbytes for name, tensor in model.named_buffers() if "inv_freq" not in name
    ) + sum(tensor.nbytes // 2 for name, tensor in model.named_buffers() if "inv_freq" in name)


def test_scales_stay_fp32_when_a_model_is_cast() -> None:
    model = sketched(llama(), zeropoint_int8.METHOD, "mlp").to(torch.bfloat16)
    store = model.model.layers[0].mlp.up_proj.store
    assert store.scale.dtype == store.zero_point.dtype == torch.float32
    assert store.codes.dtype == torch.int8
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert isinstance(store, KeepsDtype)


@pytest.mark.parametrize("method", [zeropoint_int8.METHOD, nf4.METHOD], ids=lambda method: method.name)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_state_dict_round_trip(method: Method, build: Any, tmp_path: Path) -> None:
    saved = sketched(build(), method, "all")
    other = build()
    for parameter in other.parameters():
        parameter.mul_(1.7)
    other = sketched(other, method, "all")
    assert not torch.equal(other(IDS).logits, saved(IDS).logits)
    torch.save(saved.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(IDS).logits, saved(IDS).logits)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    saved, other = sketched(llama(), nf4.METHOD), llama()
    for parameter in other.parameters():
        parameter.mul_(1.7)
    sketched(other, nf4.METHOD)
    save_model(saved, str(tmp_path / "model.safetensors"))
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(IDS).logits, saved(IDS).logits)


def test_saving_after_a_forward_changes_nothing() -> None:
    model = sketched(gpt2(), nf4.METHOD)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(IDS)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("method", [absmax_int8.METHOD, nf4.METHOD], ids=lambda method: method.name)
def test_two_quantizations_are_bit_identical(method: Method) -> None:
    first, second = sketched(llama(), method, "all").state_dict(), sketched(llama(), method, "all").state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_model_without_parameters_still_knows_its_dtype_and_generates(build: Any) -> None:
    model = sketched(build(), nf4.METHOD, "all")
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    tokens = model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, 13)


def test_conv1d_scales_belong_to_output_channels() -> None:
    layer = Conv1D(3, 2)  # 2 in, 3 out: weight (in, out)
    layer.weight = nn.Parameter(torch.tensor([[1.0, 20.0, 300.0], [-0.5, 10.0, 127.0]]))
    layer.bias = nn.Parameter(torch.tensor([0.5, 0.25, 0.125]))
    model = nn.Sequential(layer)
    stored.apply(model, Recipe("absmax-int8", absmax_int8.CODES), ["0"])
    module = model.get_submodule("0")
    assert isinstance(module, QuantizedLinear)
    scales = torch.tensor([1.0, 20.0, 300.0]) / 127
    assert torch.equal(module.store.tensors()["scale"].flatten(), scales)
    assert module.store.tensors()["codes"].tolist() == [[127, -64], [127, 64], [127, 54]]
    assert module.weight.shape == (2, 3)
    assert module.bias is layer.bias
    torch.testing.assert_close(module(torch.tensor([[1.0, 0.0]])), torch.tensor([[1.5, 20.25, 300.125]]))
    assert "in_features=2, out_features=3, method=absmax-int8" in repr(module)


class Scaled(nn.Embedding):
    """Gemma's way: a subclass whose forward does more."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 10


def test_subclasses_keep_their_forward() -> None:
    model = nn.Sequential(Scaled(4, 2))
    model[0].weight.data = torch.tensor([[1.0, 0.5], [2.0, -2.0], [0.0, 0.0], [127.0, 1.0]])
    stored.apply(model, Recipe("absmax-int8", absmax_int8.CODES), ["0"])
    torch.testing.assert_close(model(torch.tensor([1, 2, 3])), torch.tensor([[20.0, -20.0], [0, 0], [1270.0, 10.0]]))
    assert type(model[0]).__name__ == "QuantizedScaled"
    assert next(iter(stored.weights(model))).kind == "Scaled"


def test_one_module_at_two_places_stays_one() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    stored.apply(model, Recipe("absmax-int8", absmax_int8.CODES), ["a"])
    assert model["a"] is model.get_submodule("b.0")
    assert [weight.name for weight in stored.weights(model)] == ["a"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weights_name_the_module(value: float) -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(
        HarnessError, match=r"model\.layers\.1\.mlp\.up_proj: nf4 cannot quantize it: 1 non-finite value"
    ):
        sketched(model, nf4.METHOD)


def test_a_scale_that_overflows_names_the_module() -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[3e38, -3e38]])  # max - min is beyond fp32
    with pytest.raises(HarnessError, match=r"^0: zeropoint-int8 cannot quantize it: 1 non-finite values in its scale"):
        stored.apply(model, Recipe("zeropoint-int8", zeropoint_int8.CODES), ["0"])


def test_half_precision_weights_are_quantized_in_fp32() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).half()
    layer = nn.Linear(64, 5, bias=False)
    layer.weight = nn.Parameter(weight)
    model = nn.Sequential(layer)
    stored.apply(model, Recipe("absmax-int8", absmax_int8.CODES), ["0"])
    module = model.get_submodule("0")
    assert isinstance(module, QuantizedLinear)
    kept = module.store.tensors()
    assert torch.equal(kept["scale"], weight.float().abs().amax(1, keepdim=True) / 127)
    assert module.weight.dtype == torch.float16
    assert module(torch.ones(1, 64, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("method", [zeropoint_int8.METHOD, nf4.METHOD], ids=lambda method: method.name)
def test_a_bf16_model_computes_in_bf16(build: Any, method: Method) -> None:
    model, plain = dequantized_copy(build().to(torch.bfloat16), method, "all")
    logits = model(IDS).logits
    assert logits.dtype == torch.bfloat16
    assert model.dtype == torch.bfloat16
    torch.testing.assert_close(logits, plain(IDS).logits, rtol=2**-6, atol=2**-6)


def test_stored_views_are_cut_to_their_own_bytes() -> None:
    def quantize(weight: Tensor) -> dict[str, Tensor]:
        return {"codes": torch.zeros(1000, dtype=torch.int8)[:6].view(2, 3), "scale": torch.ones(9)[::9]}

    def dequantize(kept: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return kept["codes"].float()

    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    stored.apply(model, Recipe("views", Functions(quantize, dequantize)), ["0"])
    assert sizes.storage_bytes(model) == 6 + 4


def test_codes_multiply_as_they_say() -> None:
    class Behind(Rows8):
        """The scale comes behind the product."""

        def multiply(self, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
            kept = weight.tensors()
            calls.append(weight)
            assert bias is not None
            return (x @ kept["codes"].to(x.dtype).T) * kept["scale"].T + bias

    calls: list[StoredWeight] = []
    made = weight_method(name="faster", summary="", bits=8, codes=Behind(), core=False)
    slow, fast = sketched(gpt2(), absmax_int8.METHOD), sketched(gpt2(), made)
    torch.testing.assert_close(fast(IDS).logits, slow(IDS).logits, rtol=1e-5, atol=1e-5)
    assert len(calls) == 8


def test_a_method_needs_codes_or_both_functions() -> None:
    with pytest.raises(TypeError, match="the method half needs codes, or both quantize and dequantize"):
        weight_method(name="half", summary="", bits=8, quantize=absmax_int8.CODES.encode)
    with pytest.raises(TypeError, match="the method both has codes, which bring their own"):
        weight_method(name="both", summary="", bits=8, codes=absmax_int8.CODES, parameters={"block": BLOCK})


def test_load_opens_and_quantizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("harness.methods.quantizing.streaming.quantized_model", lambda *given: None)
    asked: list[tuple[Any, ...]] = []

    def open_model(*given: Any) -> Any:
        asked.append(given)
        return llama()

    monkeypatch.setattr(models, "checkpoints", SimpleNamespace(open_model=open_model), raising=False)
    checkpoint = Checkpoint("path:x", tmp_path, "0")
    model = nf4.METHOD.load(checkpoint, arguments(dtype="bf16", block=64), "cpu")
    assert sum(1 for module in model.modules() if isinstance(module, StoredWeight)) == 14
    assert not any(isinstance(m, StoredWeight) for m in REFERENCES[0].load(checkpoint, arguments(), "cpu").modules())
    assert asked == [(checkpoint, "bf16", "cpu"), (checkpoint, "fp32", "cpu")]
    assert not list(REFERENCES[0].quantized(model))
    assert not REFERENCES[0].targets(model, arguments())
