"""The census counts what is there, and refuses a model that holds less than it was asked for."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, OlmoConfig

from harness.core.contracts import Arguments, Method, QuantizedWeight, Scope
from harness.core.errors import HarnessError, IncompleteQuantization
from harness.core.values import digest
from harness.inputs.models import sizes as memory
from harness.methods import absmax_int8, nf4
from harness.methods.quantizing.codes import Recipe
from harness.methods.quantizing.stored import apply
from harness.methods.references import METHODS as REFERENCES
from harness.metrics.measuring.census import census, reached

BLOCK = {"block": 64}


def olmo(device: str = "cpu") -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 12}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(OlmoConfig(vocab_size=40, tie_word_embeddings=False, **sizes))


def gpt2(device: str = "cpu") -> Any:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            GPT2Config(vocab_size=50, n_embd=32, n_head=4, n_layer=2, n_positions=16)
        )


def test_counted_by_hand() -> None:
    model, original, arguments = olmo(), olmo("meta"), Arguments("fp32", Scope("mlp"), BLOCK)
    nf4.METHOD.sketch(model, arguments)
    found = census(model, nf4.METHOD, arguments, dict(original.named_modules()))
    layer, square = 32 * 64, 32 * 32
    assert found["quantized"] == [
        {"modules": f"model.layers.*.mlp.{name}_proj", "class": "Linear", "count": 12, "elements": 12 * layer}
        for name in ("down", "gate", "up")
    ]
    assert found["left"] == [
        {"modules": "lm_head", "class": "Linear", "count": 1, "elements": 40 * 32},
        {"modules": "model.embed_tokens", "class": "Embedding", "count": 1, "elements": 40 * 32},
        *(
            {
                "modules": f"model.layers.*.self_attn.{name}_proj",
                "class": "Linear",
                "count": 12,
                "elements": 12 * square,
            }
            for name in "koqv"
        ),
    ]
    assert found["quantized_modules"] == 36
    assert found["quantized_elements"] == 36 * layer
    assert found["left_elements"] == 48 * square + 2 * 40 * 32
    assert found["elements"] == sum(parameter.numel() for parameter in original.parameters())
    assert found["bytes_by_dtype"]["uint8"] == 36 * layer // 2
    assert sum(found["bytes_by_dtype"].values()) == memory.storage_bytes(model)
    assert found["bits_per_weight"] == 8 * (36 * (layer // 2 + layer // 64 * 4) + 64) / (36 * layer)  # 64: the table
    assert found["names"] == digest(
        sorted(f"model.layers.{n}.mlp.{name}_proj" for n in range(12) for name in ("gate", "up", "down"))
    )
    assert json.loads(json.dumps(found)) == found


def test_sketch_and_load_have_one_census() -> None:
    arguments = Arguments("fp32", Scope("all"), {})
    model, sketch, original = gpt2(), gpt2("meta"), dict(gpt2("meta").named_modules())
    for each in (model, sketch):
        absmax_int8.METHOD.sketch(each, arguments)
    found = census(model, absmax_int8.METHOD, arguments, original)
    assert found == census(sketch, absmax_int8.METHOD, arguments, original)
    biases = [entry for entry in found["left"] if entry["modules"] == "transformer.h.*.attn.c_attn"]
    assert biases == [{"modules": "transformer.h.*.attn.c_attn", "class": "Conv1D", "count": 2, "elements": 2 * 96}]
    assert found["elements"] == sum(parameter.numel() for parameter in original[""].parameters())


@pytest.mark.parametrize(("method", "dtype", "bits"), [(REFERENCES[0], "fp32", 32.0), (REFERENCES[1], "bf16", 16.0)])
def test_a_reference(method: Method, dtype: str, bits: float) -> None:
    model = gpt2()
    found = census(model, method, Arguments(dtype), dict(model.named_modules()))
    assert found["bits_per_weight"] == bits
    assert found["quantized"] == []
    assert found["left_elements"] == sum(parameter.numel() for parameter in model.parameters())  # tied head once


def partial(model: Any, names: list[str]) -> Any:
    apply(model, Recipe("absmax-int8", absmax_int8.CODES), names)
    return model


def test_fewer_than_asked_is_an_error_that_names_the_first() -> None:
    original = dict(gpt2("meta").named_modules())
    model = partial(gpt2(), ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"])
    message = (
        r"absmax-int8 left 6 of 8 modules unquantized: transformer\.h\.0\.attn\.c_attn, "
        r"transformer\.h\.0\.attn\.c_proj, transformer\.h\.0\.mlp\.c_fc, \.\.\.$"
    )
    with pytest.raises(IncompleteQuantization, match=message):
        census(model, absmax_int8.METHOD, Arguments("fp32", Scope(), {}), original)


def test_other_than_asked_is_an_error() -> None:
    original = dict(gpt2("meta").named_modules())
    model = partial(
        gpt2(), ["transformer.wte", *(f"transformer.h.{n}.mlp.{c}" for n in (0, 1) for c in ("c_fc", "c_proj"))]
    )
    with pytest.raises(IncompleteQuantization, match=r"quantized 1 modules it was not asked to: transformer\.wte$"):
        census(model, absmax_int8.METHOD, Arguments("fp32", Scope("mlp"), {}), original)


def test_bits_per_weight() -> None:
    def weight(elements: int, storage: int) -> QuantizedWeight:
        return QuantizedWeight("a", "Linear", elements, storage, torch.Tensor)

    assert memory.bits_per_weight([weight(64, 36), weight(192, 60)], "fp32") == 3.0
    assert memory.bits_per_weight([], "fp16") == 16.0


def test_without_a_list_of_layers_only_a_method_with_a_scope_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    found: Any = SimpleNamespace(name="m", dtype="", scoped=False, requires=("library",))
    assert reached(model, found, Arguments("fp32", None, {}), ["0.weight"]) == {}
    found.scoped = True
    with pytest.raises(HarnessError, match="has no list of layers"):
        reached(model, found, Arguments("fp32", Scope(), {}), ["0.weight"])
