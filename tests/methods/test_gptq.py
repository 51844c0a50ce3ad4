"""GPTQ against its definition, and against rounding to nearest on a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.core import catalog
from harness.core.contracts import Checkpoint, Method
from harness.core.errors import BadSpecification, HarnessError
from harness.core.options import Declared, build
from harness.core.specification import parse, parse_list
from harness.core.stats import paired_delta
from harness.inputs.models import checkpoints
from harness.inputs.texts import corpora, protocols
from harness.methods import linear_int4
from harness.methods.quantizing import arguments, calibration, gptq
from harness.metrics.measuring import engine
from harness.run.plan import plan

HERE = Declared(Path())


def problem(outputs: int = 24, inputs: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    mixed = torch.randn(400, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return weight, mixed.T @ mixed


def independent(weight: Tensor, hessian: Tensor, block: int, damp: float) -> np.ndarray[Any, Any]:
    """Optimal brain quantization in float64: at each column the inverse over what is left, by definition."""
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    h += damp * np.mean(np.diag(h)) * np.eye(len(h))
    result = np.empty_like(w)
    for column in range(w.shape[1]):
        if column % block == 0:
            step = np.abs(w[:, column : column + block]).max(axis=1) / 7
        left = np.linalg.inv(h[column:, column:])
        result[:, column] = np.clip(np.round(w[:, column] / step), -7, 7) * step
        loss = (w[:, column] - result[:, column]) / left[0, 0]
        w[:, column:] -= np.outer(loss, left[0])
    return result


def dequantized(stored: dict[str, Tensor], shape: tuple[int, int], block: int) -> Tensor:
    return linear_int4.CODES.decode(stored, shape, block)


@pytest.mark.parametrize("block", [16, 64])
def test_it_is_the_algorithm_of_the_paper(block: int) -> None:
    weight, hessian = problem()
    found = dequantized(gptq.quantize(weight, hessian, block, 0.01, False), (24, 64), block)
    expected = independent(weight, hessian, block, 0.01)
    close = np.isclose(found.numpy(), expected, atol=1e-4)
    assert close.mean() > 0.98  # a value half-way between codes may fall apart in fp32, and moves those behind it


@pytest.mark.parametrize("act_order", [False, True])
def test_outputs_change_less_than_by_rounding(act_order: bool) -> None:
    weight, hessian = problem(inputs=256)

    def loss(stored: dict[str, Tensor]) -> float:
        off = dequantized(stored, (24, 256), 64) - weight
        return float((off @ hessian * off).sum())

    found = loss(gptq.quantize(weight, hessian, 64, 0.01, act_order))
    assert found < 0.6 * loss(linear_int4.CODES.encode(weight, 64))


def test_independent_inputs_of_equal_strength_leave_rounding() -> None:
    weight, _ = problem()
    for act_order in (False, True):
        stored = gptq.quantize(weight, torch.eye(64), 64, 0.01, act_order)
        expected = linear_int4.CODES.encode(weight, 64)
        assert all(torch.equal(stored[name], expected[name]) for name in expected)


def test_inputs_that_are_never_there_get_no_weight() -> None:
    weight, hessian = problem()
    hessian[5], hessian[:, 5] = 0, 0
    assert not dequantized(gptq.quantize(weight, hessian, 64, 0.01, False), (24, 64), 64)[:, 5].any()


def test_what_is_gathered_is_the_second_moment() -> None:
    layer = torch.nn.Linear(8, 4)
    inputs = gptq.Inputs(layer)
    batches = [torch.randn(2, 3, 8), torch.randn(1, 5, 8)]
    for batch in batches:
        layer(batch)
    rows = torch.cat([batch.flatten(0, 1) for batch in batches])
    torch.testing.assert_close(inputs.close(), rows.T @ rows)
    assert not layer._forward_pre_hooks
    with pytest.raises(HarnessError, match="saw no input"):
        gptq.Inputs(layer).close()


def opened(name: str) -> tuple[Checkpoint, Any]:
    checkpoint = checkpoints.materialise(parse(name), HERE)
    return checkpoint, checkpoints.open_model(checkpoint, "fp32", "cpu")


def test_layers_passed_one_by_one_are_the_model() -> None:
    """Without quantizing anything the walk must leave the hidden states where the model has them."""
    for name in ("tiny-gpt2", "tiny-olmo"):
        _, model = opened(name)
        ids = torch.arange(40)[None] % 60
        stack, depth = arguments.decoder_layers(model)
        layers = [model.get_submodule(f"{stack}.{number}") for number in range(depth)]
        with torch.no_grad():
            (calls,) = gptq._calls(model, layers, [ids])
            hidden = [calls[0][0][0]]
            for layer, call in zip(layers, calls, strict=True):
                hidden = gptq._through(layer, hidden, [call])
            whole = model(input_ids=ids, output_hidden_states=True, use_cache=False).logits
            norm = model.get_submodule("transformer.ln_f" if name == "tiny-gpt2" else "model.norm")
            assert torch.equal(model.get_output_embeddings()(norm(hidden[0])), whole)


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-olmo"])
def test_it_beats_rounding_at_equal_bits_on_a_model_that_was_never_quantized(name: str) -> None:
    checkpoint, _ = opened(name)
    corpus = corpora.read(parse("synthetic"), HERE)
    made = protocols.plan(
        corpus, protocols.parse(parse("chunk:256")), checkpoints.tokenizer(checkpoint), context=256, max_tokens=16384
    )
    losses, sizes = {}, {}
    for method in ("gptq-int4", "linear-int4"):
        chosen = arguments.resolve(parse(method), catalog.methods()[method], "cpu")
        model = catalog.methods()[method].load(checkpoint, chosen, "cpu")
        losses[method] = engine.score(model, made.windows, device="cpu")
        sizes[method] = sum(weight.storage for weight in catalog.methods()[method].quantized(model))
    assert sizes["gptq-int4"] == sizes["linear-int4"]
    found = paired_delta(losses["gptq-int4"], losses["linear-int4"], protocols.window_slices(made))
    assert found.usable
    assert found.value < 0


def resolved(text: str) -> tuple[Method, Any]:
    method = catalog.methods()["gptq-int4"]
    return method, arguments.resolve(parse(text), method, "cpu")


def test_the_calibration_is_recorded_and_seeded() -> None:
    checkpoint, model = opened("tiny-gpt2")
    facts = []
    for text in (
        "gptq-int4:windows=2:length=32",
        "gptq-int4:windows=2:length=32",
        "gptq-int4:windows=2:length=32:seed=1",
    ):
        windows, found = calibration.windows(model, checkpoint, resolved(text)[1])
        assert [window.shape for window in windows] == [(1, 32)] * 2
        facts.append(found)
    assert facts[0] == facts[1]
    assert facts[0]["token_sha256"] != facts[2]["token_sha256"]
    assert {key: facts[0][key] for key in ("text", "seed", "windows", "tokens_a_window")} == {
        "text": "model",
        "seed": 0,
        "windows": 2,
        "tokens_a_window": 32,
    }
    method, chosen = resolved("gptq-int4:windows=2:length=32:text=synthetic")
    loaded: Any = method.load(checkpoint, chosen, "cpu")
    assert loaded.calibration["text"] == "synthetic"
    calibration.refuse_shared_lines(loaded.calibration, corpora.read(parse("lee"), HERE), HERE, "gptq-int4")
    with pytest.raises(HarnessError, match="which is the very text that it is measured on"):
        calibration.refuse_shared_lines(loaded.calibration, corpora.read(parse("synthetic"), HERE), HERE, "gptq-int4")
    assert "text=synthetic" in arguments.method_id(method, chosen, 1)
    with pytest.raises(BadSpecification, match="write length=N"):
        calibration.cut("synthetic", HERE, checkpoint, 1, 20000, 0, model)


@pytest.mark.parametrize(("method", "text"), [("gptq-int4:text=lee", "lee"), ("gptq-int4", "lee-50")])
def test_never_on_the_text_that_is_measured(method: str, text: str) -> None:
    given = {"methods": parse_list(method), "datasets": parse_list(text)}
    with pytest.raises(BadSpecification, match=f"would be calibrated on '{text}', on which it is measured"):
        plan(build(given, HERE, Path()), False)


def test_never_on_a_line_of_the_text_that_is_measured(tmp_path: Path) -> None:
    both = "The same line in both, long enough to tell them.\nShort.\n"
    (tmp_path / "mine.txt").write_text(f"A line that only this text has, long enough to tell.\n{both}")
    (tmp_path / "other.txt").write_text(f"  {both}Another line.\n")
    here = Declared(tmp_path, datasets={"mine": "text:mine.txt", "other": "text:other.txt"})
    with pytest.raises(HarnessError, match=r"shares 1 line \('The same line in both.*name another text"):
        calibration.refuse_shared_lines({"text": "mine"}, corpora.read(parse("other"), here), here, "gptq-int4")
    calibration.refuse_shared_lines({"text": "model"}, corpora.read(parse("other"), here), here, "gptq-int4")


def test_by_default_it_is_real_text_where_the_tokenizer_reads_it() -> None:
    for model, text in (("smollm2-135m", "lee-50"), ("tiny-olmo", "model")):
        checkpoint = checkpoints.materialise(parse(model), HERE)
        assert calibration.chosen("auto", checkpoint) == text
        assert calibration.chosen("mine", checkpoint) == "mine"


def test_scopes_and_blocks_that_cannot_be() -> None:
    checkpoint, model = opened("tiny-olmo")
    method, chosen = resolved("gptq-int4:all")
    with pytest.raises(BadSpecification, match="write linear, attention or mlp"):
        method.targets(model, chosen)
    method, chosen = resolved("gptq-int4:block=512")
    with pytest.raises(HarnessError, match="no multiple of 512: write gptq-int4:block=N"):
        method.load(checkpoint, chosen, "cpu")
