"""What a card must hold, predicted without one: counts by hand, every core method of the known models, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from harness.__main__ import parser
from harness.core import catalog
from harness.core.errors import HarnessError, MissingPackage
from harness.core.specification import parse
from harness.inputs.models import names
from harness.methods.quantizing.arguments import resolve
from harness.metrics.measuring import card_memory, fake_card
from harness.metrics.measuring.card_memory import Prediction
from harness.run import plan, prediction

MODELS = ("gpt2", "olmo-1b", "phi-3-mini")
CORE = sorted(name for name, method in catalog.methods().items() if method.core)
HIDDEN, MLP, LAYERS, VOCABULARY, CONTEXT = 768, 3072, 12, 50257, 1024  # of gpt2
PARAMETERS = (
    (VOCABULARY + CONTEXT) * HIDDEN  # embeddings of tokens, which are the head too, and of positions
    + LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * MLP)  # weights: query, key and value, output, up, down
    + LAYERS * (3 * HIDDEN + HIDDEN + MLP + HIDDEN)  # their biases
    + (2 * LAYERS + 1) * 2 * HIDDEN  # weights and biases of the norms
)
FP32, INT64 = 4, 8  # bytes


def predict(config: Any, text: str, window: int, decode: int = 0) -> Prediction:
    specification = parse(text)
    method = catalog.methods()[specification.name]
    return card_memory.predict(config, method, resolve(specification, method, "cuda"), window, decode)


def gpt2(**changes: Any) -> Any:
    return AutoConfig.for_model(**{**names.ARCHITECTURES["gpt2"], **changes})


# by hand


def test_gpt2_in_fp32_by_hand() -> None:
    window = 512
    found = predict(gpt2(), "fp32", window)
    assert found.weights == FP32 * PARAMETERS == 497_759_232
    assert found.load_peak == found.weights  # each tensor comes once, in its dtype
    at_the_head = (
        INT64 * window  # ids
        + FP32 * window * HIDDEN  # what the last norm gave: all else of the layers is freed
        + FP32 * window * VOCABULARY  # the logits of every position, of which nobody makes a copy
    )
    assert at_the_head == 104_503_296
    assert found.activations == at_the_head  # far above a layer's, some ten times 512 x 3072 numbers
    assert found.run_peak == found.weights + at_the_head
    assert found.cache == 0


def test_a_small_vocabulary_moves_the_peak_into_the_mlp() -> None:
    window = 512
    assert predict(gpt2(vocab_size=100, n_layer=1), "fp32", window).activations == (
        2 * INT64 * window  # ids and positions
        # embeddings of both and their sum, attention's output, the same with the sum, the norm of that
        + 6 * FP32 * window * HIDDEN
        # in 0.5 x (1 + tanh(.)): x, 0.5 x and an operation's input and output
        + 4 * FP32 * window * MLP
    )


def test_the_cache_by_hand() -> None:
    window, decode = 8, 1000
    found = predict(gpt2(), "fp16", window, decode)
    half = 2
    assert found.cache == (window + decode) * LAYERS * 2 * HIDDEN * half  # keys and values of every token and layer
    assert found.run_peak == found.weights + found.activations + found.cache
    growing = (window + decode) * HIDDEN * half  # a layer's keys, or values, are copied into longer ones
    assert found.activations < 3 * growing + half * VOCABULARY + 64 * FP32 * HIDDEN  # one row of logits, one token


def test_a_long_prompt_peaks_before_its_tokens() -> None:
    """Behind so short a cache a token's forward is nothing; the prompt's activations are the peak."""
    one, many = predict(gpt2(), "fp16", 1000, 1), predict(gpt2(), "fp16", 1000, 24)
    assert one.run_peak == many.run_peak
    assert many.cache - one.cache == 23 * LAYERS * 2 * HIDDEN * 2
    half, at_prompt = 2, 1000 * LAYERS * 2 * HIDDEN * 2
    assert one.run_peak == one.weights + one.activations + at_prompt
    assert one.activations > 1000 * MLP * half


def test_no_scores_are_held_by_attention() -> None:
    """(heads, L, L) scores of a window of 1024 in fp16 would be 25 MB; what grows with L alone doubles."""
    small = {"vocab_size": 100, "n_layer": 1}
    short, long = (predict(gpt2(**small), "fp16", window).activations for window in (512, 1024))
    assert long == pytest.approx(2 * short, rel=0.01)


def test_a_method_of_ours_holds_the_unquantized_model_while_it_loads() -> None:
    whole, found = predict(gpt2(), "fp16", 8), predict(gpt2(), "nf4", 8)
    read_quantized = predict(gpt2(), "bnb-nf4", 8)
    widest = HIDDEN * MLP
    assert whole.weights < found.load_peak < whole.weights + 6 * FP32 * widest
    assert read_quantized.load_peak < whole.weights / 1.9
    assert found.weights == pytest.approx(read_quantized.weights, rel=1e-3)


# every core method


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize("model", MODELS)
def test_every_core_method_of_the_known_models(model: str, name: str) -> None:
    config = names.config_of(model)
    found = predict(config, name, 512)
    logits = 512 * config.vocab_size * (4 if name == "fp32" else 2)
    assert found.load_peak >= found.weights > 0
    assert found.activations >= logits
    assert found.run_peak == found.weights + found.activations


# the command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    parsed = parser().parse_args(["memory", *arguments])
    return parsed.run(parsed), capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    here = json.loads(run(capsys, "gpt2", "--method", "nf4:dtype=fp16", "--json")[1])
    _, text = run(capsys, "gpt2", "--method", "nf4", "--device", "cuda", "--window", "64", "--decode", "3", "--json")
    answer = json.loads(text)
    assert {key: answer[key] for key in here} == here  # a card's default dtype is fp16; all else is as without one
    found = predict(gpt2(), "nf4", 64, 3)
    assert {key: answer[key] for key in answer.keys() - here.keys()} == {
        "cuda.load_peak": found.load_peak,
        "cuda.run_peak": found.run_peak,
        "cuda.weights": found.weights,
        "cuda.activations": found.activations,
        "cuda.kv_cache": found.cache,
        "cuda.window": 64,
        "cuda.decode": 3,
        "cuda.not_counted": list(card_memory.NOT_COUNTED),
    }


def test_words(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "gpt2", "--device", "cuda")[1]
    for part in ("one forward over 512 tokens", "602,262,528 B", "104,503,296 B", "the driver's context", "cuBLAS"):
        assert part in text
    assert "key-value cache" not in text
    assert "key-value cache" in run(capsys, "gpt2", "--device", "cuda", "--window", "8", "--decode", "2")[1]
    assert "on a card" not in run(capsys, "gpt2")[1]


def test_the_window_is_no_longer_than_the_context(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**names.ARCHITECTURES["gpt2"], "n_positions": 100, "n_layer": 1}))
    answer = json.loads(run(capsys, str(tmp_path), "--device", "cuda", "--json")[1])
    assert answer["cuda.window"] == 100


@pytest.mark.parametrize(
    ("method", "limit", "fits"),
    [
        ("fp32", "602262528B", True),  # the peak of running is the larger
        ("fp32", "602262527B", False),
        ("nf4", "300000000B", True),
        ("nf4", "200000000B", False),  # it runs in so much, but is loaded from fp16
    ],
)
def test_fits_judges_the_larger_peak(method: str, limit: str, fits: bool, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("gpt2", "--method", method, "--device", "cuda", "--fits", limit)
    status, text = run(capsys, *words, "--json")
    answer = json.loads(text)
    assert (status, answer["fits"]) == (0 if fits else 1, fits)
    assert ("fits into" in run(capsys, *words)[1]) == fits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cuda", "--window", "0"), "--window is 1 or more"),
        (("--device", "cuda", "--decode", "-1"), "--decode 0 or more"),
        (("--device", "cuda", "--window", "1025"), "beyond the context of gpt2, 1024 tokens"),
        (("--device", "cuda", "--window", "1000", "--decode", "25"), "1025 tokens are beyond"),
        (("--window", "512"), "add --device cuda"),
        (("--decode", "0"), "add --device cuda"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HarnessError, match=message) as caught:
        run(capsys, "gpt2", *arguments)
    assert "\n" not in str(caught.value)


def test_a_method_whose_library_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "installed", lambda name: name != "bitsandbytes", raising=False)
    monkeypatch.setattr(prediction, "missing_packages", lambda method: list(method.requires)[:1])
    with pytest.raises(MissingPackage, match="bitsandbytes"):
        run(capsys, "gpt2", "--method", "bnb-nf4", "--device", "cuda")


def test_an_architecture_that_looks_at_its_values_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    forward: Any = GPT2MLP.forward

    def looking(self: Any, x: torch.Tensor) -> Any:
        return forward(self, x if bool(x.max() > 0) else -x)

    monkeypatch.setattr(GPT2MLP, "forward", looking)
    with pytest.raises(HarnessError, match=r"^gpt2: its forward under fp32 does not run without values") as caught:
        run(capsys, "gpt2", "--device", "cuda")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bloom", "gemma2", "mistral", "qwen2", "falcon", "gpt_neo", "opt"])
def test_other_attention_masks_and_positions(kind: str) -> None:
    sizes = {"num_hidden_layers": 2} if kind != "gpt_neo" else {}
    found = predict(AutoConfig.for_model(kind, **sizes), "fp16", 64, 4)
    assert found.cache > 0
    assert found.run_peak > found.weights + found.cache


def test_a_recurrent_model_runs_and_its_state_is_told_apart() -> None:
    config = AutoConfig.for_model("mamba", num_hidden_layers=2)
    assert predict(config, "fp16", 64).activations >= 64 * config.vocab_size * 2
    with pytest.raises(HarnessError, match="mamba keeps no past_key_values: leave out --decode"):
        predict(config, "fp16", 64, 2)


@pytest.mark.parametrize("rows", [1, 64])  # torch._int_mm takes more than 16; fewer go through fp32
def test_int8_products_of_few_rows_hold_the_weight_in_fp32(rows: int) -> None:
    found = predict(gpt2(n_layer=1, vocab_size=100), "absmax-int8-w8a8", rows)
    assert (found.activations > FP32 * MLP * 512) == (rows == 1)  # a slice of the widest weight


# the card itself


def test_the_card_answers_for_its_tensors() -> None:
    with fake_card.present() as card:
        kept = torch.ones(3, 4, device="cuda")  # 48 bytes, with values
        assert (kept.device, kept.is_cuda, kept.is_cpu) == (torch.device("cuda", 0), True, False)
        assert card.now == 48
        assert float((kept + 1).sum()) == 24.0
        assert card.now == 48
        assert card.peak >= 96
        assert kept.cpu().device.type == "cpu"
        assert torch.ones(2).to("cuda").is_cuda
        assert torch.tensor([1.5], device="cuda").tolist() == [1.5]
        assert torch.ones(3).device.type == "cpu"
        assert torch.empty(3, device="meta").device.type == "meta"
        del kept
        assert card.now == 0


def test_host_and_card_do_not_meet() -> None:
    with fake_card.present() as card:
        there = torch.empty(8, 8, device="meta")
        card.take(there)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(8)
        with pytest.raises(fake_card.Valueless):
            there.cpu()
        with pytest.raises(fake_card.Valueless):
            torch.ones(8, 8).copy_(there)
        with pytest.raises(fake_card.Valueless):
            torch.ones(8, 8, device="cuda").add_(there)
        assert (there * torch.tensor(2.0)).is_cuda  # a number of the host may join


def test_half_precision_takes_no_copy_of_shared_keys() -> None:
    """Queries that share keys: flash attention reads them as they lie; fp32 repeats them and holds the scores."""

    def peak(dtype: torch.dtype) -> int:
        with fake_card.present() as card:
            query, key = (torch.empty(1, heads, 256, 64, dtype=dtype, device="cuda") for heads in (8, 2))
            before = card.now
            torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
            return card.peak - before

    assert peak(torch.float16) == 8 * 256 * 64 * 2 + 8 * 256 * 4  # what comes out, and a sum a row
    assert peak(torch.float32) > 8 * 256 * 256 * 4
