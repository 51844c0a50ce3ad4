from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.core.contracts import Checkpoint
from harness.core.options import Declared
from harness.core.specification import parse
from harness.inputs.models import checkpoints
from harness.inputs.texts import synthetic
from studies import tiny
from tests.inputs.test_synthetic import entropy_rate

HELD_OUT = 64 * tiny.CONTEXT  # tokens
REVISIONS = {  # what baselines/ was recorded with: other bits would leave every record of the tiny models without a use
    "gpt2": "b8691cc2f9bc8659ce5ac8c6bba27edd5c4f8c7867a3b8c8ab157e48a532b5e8",
    "olmo": "a763bdf86a3c3a6a5113ace51ccc27022250839a5f370da12a475323d6ed8d0a",
}


def shipped(name: str) -> Checkpoint:
    return checkpoints.materialise(parse(f"tiny-{name}"), Declared(Path()))


@pytest.mark.parametrize("name", ["gpt2", "olmo"])
def test_perplexity_is_near_the_language_s_floor(name: str) -> None:
    checkpoint = shipped(name)
    model: Any = checkpoints.open_model(checkpoint, "fp32", "cpu")
    tokenizer: Any = checkpoints.tokenizer(checkpoint)
    ids = torch.tensor(tokenizer(synthetic.text(HELD_OUT), verbose=False).input_ids).view(-1, tiny.CONTEXT)
    total = 0.0
    with torch.no_grad():
        for window in torch.tensor_split(ids, 8):
            log_p = model(input_ids=window).logits[:, :-1].double().log_softmax(-1)
            total -= log_p.gather(2, window[:, 1:, None]).sum().item()
    perplexity = math.exp(total / (len(ids) * (tiny.CONTEXT - 1)))
    floor = math.exp(entropy_rate())
    assert floor * 0.99 < perplexity < floor * 1.05


@pytest.mark.parametrize("name", ["gpt2", "olmo"])
def test_the_weights_are_the_same_bytes_on_every_machine(name: str) -> None:
    checkpoint = shipped(name)
    assert checkpoint.revision == REVISIONS[name]
    assert "never quantized" in checkpoint.note
    model: Any = checkpoints.open_model(checkpoint, "fp32", "cpu")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    whole = sum(path.stat().st_size for path in checkpoint.directory.iterdir())
    assert whole < 1_000_000  # the package ships it


def test_the_teacher_is_the_language() -> None:
    table = tiny.teacher().double().numpy()  # (64, 64, 64)
    words = len(synthetic.WORDS)
    np.testing.assert_allclose(table[:words, :words, :words], synthetic.transitions(), atol=1e-7)
    np.testing.assert_allclose(table[tiny.EOS, :words].sum(axis=1), 1.0, atol=1e-5)
    assert table[:, :, words:].max() == 0.0
    # after one word b alone: sum over a of P(a | b is last) P(c | a, b)
    pairs = synthetic.stationary()
    b = 7
    mixed = (pairs[:, b] / pairs[:, b].sum()) @ synthetic.transitions()[:, b, :]
    np.testing.assert_allclose(table[tiny.EOS, b, :words], mixed, atol=1e-6)
    np.testing.assert_allclose(table[tiny.EOS, tiny.EOS, :words], pairs.sum(axis=1), atol=1e-6)


def test_one_token_a_word_and_nothing_added() -> None:
    tokenizer: Any = checkpoints.tokenizer(shipped("gpt2"))
    text = synthetic.text(100, seed=4)
    ids = tokenizer(text).input_ids
    assert ids == synthetic.word_ids(100, seed=4)
    assert tokenizer.decode(ids).split() == text.split()
    assert tokenizer("nonsense").input_ids == [tiny.VOCABULARY.index("<unk>")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (tiny.EOS, tiny.EOS, 64)


def test_training_starts_from_a_seed_and_leaves_the_callers_random_state_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    short = tiny.Schedule(steps=1, tokens=512)
    first, second = (tiny.train("olmo", short).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weight, second[key]) for key, weight in first.items())


@pytest.mark.parametrize("name", ["gpt2", "olmo"])
def test_every_matrix_divides_into_blocks_of_64(name: str) -> None:
    model: Any = tiny.untrained(name)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    assert len(matrices) >= 2 + 4 * tiny.LAYERS
    assert all(size % 64 == 0 for matrix in matrices for size in matrix.shape)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (name == "gpt2")
