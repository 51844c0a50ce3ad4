"""Every negative control on the tiny models: the fault bears its mark, the right version does not."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.core.options import Declared
from harness.core.specification import parse
from harness.inputs.models import checkpoints
from harness.inputs.texts import corpora, protocols
from harness.methods.quantizing import stored
from harness.metrics.measuring import engine
from harness.published.pitfalls import PITFALLS, kept_code, perplexity, restored, tied_twice, with_padding
from studies import tiny
from studies.pitfalls import CONTROLS, EMBEDDED, TINY, Bench, Control, scoring, sink, weights
from studies.pitfalls.bench import mean


@functools.cache
def bench(model: str) -> Bench:
    declared = Declared(Path())
    checkpoint = checkpoints.materialise(parse(model), declared)
    return Bench(checkpoint, corpora.read(parse("synthetic"), declared), width=64, characters=16)


def pairs() -> list[Any]:
    return [
        pytest.param(control, model, id=f"{control.name}-{model}")
        for control in CONTROLS
        for model in TINY
        if model in control.models
    ]


@pytest.mark.parametrize(("control", "model"), pairs())
def test_the_fault_bears_its_mark_and_the_right_version_does_not(control: Control, model: str) -> None:
    shown = control.run(bench(model))
    assert list(shown.fault) == list(shown.right)
    assert control.pitfall.symptom(shown.fault)
    assert not control.pitfall.symptom(shown.right)


@pytest.mark.parametrize(
    "control", [one for one in CONTROLS if not set(one.models) & set(TINY)], ids=lambda one: one.name
)
def test_controls_that_need_a_model_trained_on_prose(control: Control) -> None:
    declared = Declared(Path())
    checkpoint = checkpoints.materialise(parse(EMBEDDED), declared)
    shown = control.run(Bench(checkpoint, corpora.read(parse("lee"), declared), max_tokens=256))
    assert control.pitfall.symptom(shown.fault)
    assert not control.pitfall.symptom(shown.right)


def test_every_pitfall_is_shown_once_and_its_cause_is_told() -> None:
    assert [control.name for control in CONTROLS] == list(PITFALLS)
    assert all(len((control.run.__doc__ or "").splitlines()) > 2 for control in CONTROLS)


def test_scored_padding_is_as_the_formula_has_it() -> None:
    shown = scoring.padding_scored(bench("tiny-gpt2"))
    text, padding = (shown.beside[f"perplexity of the {what} among them"] for what in ("text positions", "padding"))
    share = shown.fault["padding scored, %"] / 100
    assert with_padding(text, padding, share) == pytest.approx(shown.fault["perplexity"], rel=1e-5)


@pytest.mark.parametrize("divisor", [255, 256])
def test_stored_codes_are_as_the_formula_has_them(divisor: int) -> None:
    row = torch.randn(1, 200, generator=torch.Generator().manual_seed(5)).double()
    low, high = row.min().item(), row.max().item()
    stored = weights.affine_codes(row, divisor=divisor, by_row=1)
    codes = [kept_code(value, low, high, divisor) for value in row[0].tolist()]
    assert stored["codes"][0].tolist() == codes
    back = weights.affine_weight(stored, (1, 200), divisor=divisor, by_row=1)
    assert back[0].tolist() == pytest.approx([restored(code, low, high, divisor) for code in codes], abs=1e-6)


def test_a_tied_head_counted_twice_is_as_the_formula_has_it() -> None:
    where = bench("tiny-gpt2")
    shown = weights.tied_head_twice(where)
    model: Any = where.open()
    rows, width = model.get_input_embeddings().weight.shape
    assert shown.fault["bytes counted"] == tied_twice(int(shown.fault["bytes held"]), rows, width)


def test_a_mean_is_summed_in_float64() -> None:
    assert mean(np.array([1.0, 2.0, 6.0])) == 3.0


def test_codes_without_scale_are_integers() -> None:
    model = bench("tiny-olmo").open("absmax-int8-tensor:mlp")
    weights.drop_scales(model)
    restored = [store.restore() for store in weights.stores(model)]
    assert len(restored) == 6
    for weight in restored:
        assert torch.equal(weight, weight.round())
        assert weight.abs().max() == 127


def test_the_top_code_of_2_to_the_b_is_0_in_8_bits() -> None:
    row = torch.tensor([[0.0, 128.0, 255.0, 256.0]])
    faulty = weights.affine_codes(row, divisor=256, by_row=1)
    assert faulty["codes"].tolist() == [[0, 128, 255, 0]]  # step 1: the maximum is 256 = 0 modulo 256
    assert weights.affine_weight(faulty, (1, 4), divisor=256, by_row=1).tolist() == [[0.0, 128.0, 255.0, 0.0]]
    right = weights.affine_codes(row[:, :3], divisor=255, by_row=1)
    assert right["codes"].tolist() == [[0, 128, 255]]


def test_one_step_a_tensor_spans_all_rows() -> None:
    stored = weights.affine_codes(torch.tensor([[0.0, 1.0], [2.0, 5.1]]), divisor=255, by_row=0)
    assert stored["scale"].shape == (1, 1)
    assert stored["codes"].tolist() == [[0, 50], [100, 255]]


def test_unpacking_once_gives_the_same_numbers_without_further_work() -> None:
    where = bench("tiny-gpt2")
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        packed: Any = weights.without_kernel(where.open("absmax-int8"))
        calls = weights.counted(packed)
        first, second = (packed(input_ids=ids).logits for _ in range(2))
        once: Any = weights.unpacked_once(where.open("absmax-int8"))
        assert calls == [2 * 8]  # two forwards of eight projections
        assert torch.equal(first, second)
        torch.testing.assert_close(once(input_ids=ids).logits, first, rtol=0, atol=1e-5)
    assert not any(isinstance(module, stored.QuantizedLinear) for module in once.modules())


def test_labels_shifted_by_one_are_the_engine_s() -> None:
    where = bench("tiny-olmo")
    model, windows = where.open(), where.plan.windows[:3]
    theirs = engine.score(model, windows, device="cpu")
    np.testing.assert_allclose(scoring.offset_nll(model, windows, 1), theirs, atol=1e-4)
    assert len(scoring.offset_nll(model, windows, 0)) == len(theirs) + 3
    assert len(scoring.offset_nll(model, windows, 2)) == len(theirs) - 3


def test_padding_leaves_the_text_before_it_alone() -> None:
    where = bench("tiny-gpt2")
    model, windows = where.open(), [where.window(text) for text in where.texts()[:3]]
    nll, padding = scoring.padded_nll(model, windows, 32, tiny.EOS)
    assert len(nll) == 3 * 31
    assert padding.sum() == sum(32 - len(window.ids) for window in windows)
    np.testing.assert_allclose(nll[~padding], engine.score(model, windows, device="cpu"), atol=1e-4)


def test_sentences_end_at_their_marks() -> None:
    assert scoring.sentences("It rained. Why? 3.5 mm! End") == ["It rained.", "Why?", "3.5 mm!", "End"]


def test_the_average_over_sentences_is_the_mean_of_their_perplexities() -> None:
    where = bench("tiny-olmo")
    shown = scoring.sentence_average(where)
    windows = [where.window(text) for text in where.texts()]
    alone = [perplexity(where.nll(where.open(), [window])) for window in windows[:5]]
    together = scoring.sentence_average(Bench(where.checkpoint, where.corpus, width=64, max_tokens=5 * 24))
    assert together.fault["perplexity"] == pytest.approx(sum(alone) / 5, rel=1e-4)
    assert shown.beside["exp of the mean of sentence means"] <= shown.fault["perplexity"]


def test_texts_stop_at_the_token_limit() -> None:
    where = bench("tiny-gpt2")
    few = Bench(where.checkpoint, where.corpus, max_tokens=60)
    assert [len(text.split()) for text in few.texts()] == [24, 24]


def test_the_sink_head_rests_on_bos_and_then_changes_nothing() -> None:
    plain: Any = bench("tiny-olmo").open()
    model = sink.with_sink(plain)
    words = torch.arange(20)[None]
    led = torch.cat([torch.tensor([[tiny.EOS]]), words], dim=1)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=led).logits, plain(input_ids=led).logits, rtol=0, atol=1e-3)
        assert (model(input_ids=words).logits - plain(input_ids=words).logits).abs().max() > 1
    assert plain.config.num_attention_heads == 2  # the model handed in is as it was


def test_the_made_tokenizer_adds_a_bos_of_itself() -> None:
    assert protocols.leading_token(sink.leading_tokenizer(), "ba be") == tiny.EOS
    assert protocols.leading_token(tiny.tokenizer(), "ba be") is None
