"""Predicted bytes equal measured bytes, and both equal arithmetic done by hand from the configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OlmoConfig, Phi3Config

from harness.core import catalog
from harness.core.contracts import Arguments, Checkpoint, Method
from harness.inputs.models import checkpoints
from harness.inputs.models import sizes as memory
from harness.methods.quantizing import bnb

BNB = ("bnb-int8", "bnb-fp4", "bnb-nf4", "bnb-nf4-dq")
DTYPES = ("fp32", "fp16", "bf16")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, intermediate_size=192, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=32),
    "olmo": lambda: OlmoConfig(**SIZES, intermediate_size=128, tie_word_embeddings=False),
    "phi3": lambda: Phi3Config(**SIZES, intermediate_size=128, num_key_value_heads=4, pad_token_id=0),
    "odd": lambda: GPT2Config(n_embd=50, n_layer=1, n_head=5, vocab_size=77, n_inner=63),  # blocks of 64 divide nothing
}
GPT2_MASKS = 12 * 1024 * 1024  # bytes of the causal masks that transformers kept as buffers before 5.2


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random model saved as a plain folder."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]()).save_pretrained(directory)
    return Checkpoint(f"path:{directory}", directory, revision="")


def arguments(method: Method, dtype: str) -> Arguments:
    return Arguments(dtype, values={name: parameter.default for name, parameter in method.parameters.items()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BNB)
def test_predicted_equals_measured_to_the_byte(checkpoint: Checkpoint, name: str, dtype: str) -> None:
    method = catalog.methods()[name]
    config = checkpoints.read_config(checkpoint)
    predicted = memory.predict(config, method, arguments(method, dtype))
    model = method.load(checkpoint, arguments(method, dtype), "cpu")
    measured = memory.measure(model)
    assert {name: predicted[name] for name in measured} == measured
    assert measured["memory.footprint"] == model.get_memory_footprint()  # type: ignore[operator]
    weights = list(method.quantized(model))
    assert predicted["linear_elements"] == sum(weight.elements for weight in weights) > 0
    stored = sum(weight.storage for weight in weights)
    assert predicted["bits_per_weight"] == 8 * stored / predicted["linear_elements"]
    # what is neither a parameter nor a buffer is exactly the state of the quantized weights
    codes = sum(weight.elements if name == "bnb-int8" else -(-weight.elements // 2) for weight in weights)
    assert measured["memory.storage"] - measured["memory.footprint"] == stored - codes


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_predicted_too(checkpoint: Checkpoint, dtype: str) -> None:
    method = catalog.methods()[dtype]
    predicted = memory.predict(checkpoints.read_config(checkpoint), method, Arguments(dtype))
    measured = memory.measure(method.load(checkpoint, Arguments(dtype), "cpu"))
    assert {name: predicted[name] for name in measured} == measured
    assert measured["memory.storage"] == measured["memory.footprint"]
    assert predicted["bits_per_weight"] == (32 if dtype == "fp32" else 16)


def predict(name: str, config: Any, dtype: str) -> dict[str, float]:
    method = catalog.methods()[name]
    return memory.predict(config, method, arguments(method, dtype))


def test_a_small_llama_by_hand() -> None:
    hidden, mlp, vocabulary, layers, key_value = 64, 192, 96, 2, 32
    a_layer = [hidden * hidden, hidden * key_value, hidden * key_value, hidden * hidden, *3 * [hidden * mlp]]
    linear = layers * sum(a_layer)
    total = linear + vocabulary * hidden + (2 * layers + 1) * hidden  # embeddings tied, norms
    rotary = 2 * 4 * (hidden // 4 // 2)  # inv_freq and its original, fp32, half the head's 16

    for name, width in (("bnb-int8", 1.0), ("bnb-fp4", 0.5), ("bnb-nf4-dq", 0.5)):
        found = predict(name, CONFIGS["llama"](), "fp16")
        assert found["memory.parameters"] == 2 * (total - linear) + width * linear
        assert found["memory.footprint"] == found["memory.parameters"] + rotary
        assert found["linear_elements"] == linear

    outputs = layers * (hidden + 2 * key_value + hidden + mlp + mlp + hidden)
    blocks = [weights // 64 for weights in a_layer]
    state = {
        "bnb-int8": 4 * outputs,
        "bnb-nf4": layers * sum(4 * count + 4 * 16 for count in blocks),
        "bnb-nf4-dq": layers * sum(count + 4 * -(-count // 256) + 4 * 16 + 4 * 256 + 4 for count in blocks),
    }
    for name, expected in state.items():
        found = predict(name, CONFIGS["llama"](), "fp16")
        assert found["memory.storage"] - found["memory.footprint"] == expected


@pytest.mark.parametrize(
    ("dtype", "name", "mebibytes"),
    [("fp32", "fp32", 486.70), ("fp16", "fp16", 249.35), ("fp16", "bnb-int8", 168.35), ("fp16", "bnb-nf4", 127.85)],
)
def test_public_footprints_of_gpt2(dtype: str, name: str, mebibytes: float) -> None:
    """A public study's four sizes, taken when the masks were still buffers."""
    found = predict(name, GPT2Config(), dtype)
    assert (found["memory.footprint"] + GPT2_MASKS) / 2**20 == pytest.approx(mebibytes, abs=0.005)


def test_phi_3_mini_from_its_sizes_alone() -> None:
    config = Phi3Config(vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32)
    total, linear = 3_821_079_552, 3_623_878_656
    found = predict("bnb-nf4", config, "fp16")
    assert found["linear_elements"] == linear
    assert found["memory.parameters"] == 2 * (total - linear) + linear // 2
    assert found["memory.storage"] - found["memory.footprint"] == 4 * linear // 64 + 4 * 32 * 4 * 16
    assert found["bits_per_weight"] == pytest.approx(4.5, abs=1e-4)


@pytest.mark.parametrize("name", BNB)
def test_storage_after_the_first_forward(name: str, tmp_path: Path) -> None:
    """Unchanged, except where the processor has AVX512-BF16: there scales are bf16 and double quantization is gone."""
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).save_pretrained(tmp_path)
    checkpoint = Checkpoint(f"path:{tmp_path}", tmp_path, revision="")
    method = catalog.methods()[name]
    model = method.load(checkpoint, arguments(method, "fp32"), "cpu")
    before = memory.storage_bytes(model)
    sizes = [weight.elements for weight in method.quantized(model)]
    with bnb.quiet(), torch.inference_mode():
        model(torch.arange(8)[None])
    expected = before
    if has_avx512bf16() and name != "bnb-int8":
        absmax = sum(2 * size // 64 for size in sizes)
        tables = len(sizes) * (4 * 16 + (4 if name == "bnb-nf4-dq" else 0))  # the offset stays behind
        expected = int(memory.measure(model)["memory.footprint"]) + absmax + tables
    assert memory.storage_bytes(model) == expected
