"""Peaks predicted without a card, a count by hand, and what the pretended card's allocator was asked for.

Every core method's peaks are held to their prediction where they are measured: `measuring.hold_prediction`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from harness.core import catalog
from harness.core.specification import parse
from harness.methods.quantizing.arguments import resolve
from harness.metrics.measuring import card_memory
from harness.metrics.measuring.card_memory import Prediction
from harness.run.prediction import find_config
from tests.rehearsal import folders
from tests.rehearsal.measuring import AGREEMENT, Plan, group_of, run

HIDDEN, MLP, CONTEXT = 768, 3072, 1024  # of gpt2
FP32, INT64 = 4, 8  # bytes


def predict(plan: Plan, method: str, window: int, decode: int = 0) -> Prediction:
    known = catalog.methods()[method]
    arguments = resolve(parse(method), known, "cuda")
    return card_memory.predict(find_config(plan.model), known, arguments, window, decode)


def test_one_layer_of_gpt2_in_fp32_by_hand(plan_of: Callable[[str], Plan]) -> None:
    plan, window = plan_of("gpt2"), 512
    rows = run(plan.with_metrics("memory.load_peak", "memory.run_peak"), "fp32", "cuda").rows
    weights = FP32 * (
        (folders.VOCABULARY["gpt2"] + CONTEXT) * HIDDEN
        + 4 * HIDDEN * HIDDEN + 2 * HIDDEN * MLP  # query, key and value, output; up and down
        + 3 * HIDDEN + HIDDEN + MLP + HIDDEN  # their biases
        + 3 * 2 * HIDDEN  # norms
    )  # fmt: skip
    ran = (
        weights
        + 2 * INT64 * window  # ids and positions
        # embeddings of both and their sum, attention's output, the same with the sum, the norm of that
        + 6 * FP32 * window * HIDDEN
        # in 0.5 x (1 + tanh(.)): x, 0.5 x and an operation's input and output
        + 4 * FP32 * window * MLP
    )
    found = predict(plan, "fp32", window)
    assert rows["memory.load_peak"].detail["requested"] == found.load_peak == weights
    assert rows["memory.run_peak"].detail["requested"] == found.run_peak == ran
    assert rows["memory.run_peak"].detail["tokens"] == window
    assert rows["memory.run_peak"].value == pytest.approx(ran, rel=AGREEMENT)  # the pool's rounding, in the value


@pytest.mark.parametrize(("window", "tokens"), [(8, 24), (200, 3)])
@pytest.mark.parametrize("method", ["fp16", "nf4", "bnb-nf4"])
def test_decoding_step_by_step(method: str, window: int, tokens: int, plan_of: Callable[[str], Plan]) -> None:
    """The prediction grows the cache at once; here every token is decoded."""
    plan = plan_of("tiny-gpt2")
    with group_of(plan, method, "cuda") as (group, card):
        assert card is not None
        model = group.model
        gc.collect()
        card.settle().reset_peaks()
        with torch.inference_mode():
            ids = torch.arange(window, device="cuda")[None] % 64
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            for _ in range(tokens):
                model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        peak = card.settle().peak_requested
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        del cache, ids, model
    found = predict(plan, method, window, tokens)
    assert found.cache == held
    assert found.run_peak == pytest.approx(peak, rel=AGREEMENT)
