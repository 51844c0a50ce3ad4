from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.core.options import Declared
from harness.core.specification import parse
from harness.inputs.models import checkpoints, tiny
from harness.inputs.texts import synthetic
from tests.inputs.test_synthetic import entropy_rate

SHORT = tiny.Schedule(steps=4, tokens=512)
HELD_OUT = 64 * tiny.CONTEXT  # tokens


@pytest.mark.parametrize("name", ["gpt2", "olmo"])
def test_perplexity_is_near_the_language_s_floor(name: str, tmp_path: Path) -> None:
    """On the cached model, trained at first use."""
    checkpoint = checkpoints.materialise(parse(f"tiny-{name}"), Declared(tmp_path))
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
def test_equal_seeds_give_equal_bits(name: str) -> None:
    """Whatever the caller's threads and random state, which come back as they were."""
    threads = torch.get_num_threads()
    states = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(count)
            before = torch.get_rng_state()
            states.append(tiny.train(name, SHORT).state_dict())
            assert torch.equal(torch.get_rng_state(), before)
            assert torch.get_num_threads() == count
            assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(threads)
    first, second = states
    assert first.keys() == second.keys()
    assert all(torch.equal(weight, second[key]) for key, weight in first.items())
    other = tiny.train(name, tiny.Schedule(steps=4, tokens=512, seed=1)).state_dict()
    assert any(not torch.equal(weight, other[key]) for key, weight in first.items())


def test_the_saved_folder_is_bitwise_the_same(tmp_path: Path) -> None:
    said: list[str] = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tiny.build("olmo", tmp_path / name, said.append, SHORT)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert len(said) == 4


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
    tokenizer: Any = tiny.tokenizer()
    text = synthetic.text(100, seed=4)
    ids = tokenizer(text).input_ids
    assert ids == synthetic.word_ids(100, seed=4)
    assert tokenizer.decode(ids).split() == text.split()
    assert tokenizer("nonsense").input_ids == [tiny.VOCABULARY.index("<unk>")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (tiny.EOS, tiny.EOS, 64)


@pytest.mark.parametrize("name", ["gpt2", "olmo"])
def test_every_matrix_divides_into_blocks_of_64(name: str) -> None:
    model: Any = tiny.untrained(name)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    assert len(matrices) >= 2 + 4 * tiny.LAYERS
    assert all(size % 64 == 0 for matrix in matrices for size in matrix.shape)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (name == "gpt2")


def test_the_cache_knows_schedule_and_architecture() -> None:
    names = {
        tiny.cache_name("gpt2"),
        tiny.cache_name("olmo"),
        tiny.cache_name("gpt2", SHORT),
        tiny.cache_name("gpt2", tiny.Schedule(seed=1)),
    }
    assert len(names) == 4
    assert tiny.cache_name("gpt2") == tiny.cache_name("gpt2", tiny.Schedule())
