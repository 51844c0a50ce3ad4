import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

from harness.core.contracts import Window
from harness.inputs.texts import protocols
from harness.methods.quantizing import cpu
from harness.metrics.measuring import engine

VOCABULARY = 61
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
CONFIGURATIONS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    ),
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "granite": lambda: transformers.GraniteConfig(**LLAMA, logits_scaling=3.0),  # logits divided after the head
    "gemma2": lambda: transformers.Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=2.0),  # logits capped
    "rembert": lambda: transformers.RemBertConfig(  # a layer of its own before the head, which is wider than the model
        **SMALL,
        num_attention_heads=4,
        input_embedding_size=16,
        output_embedding_size=48,
        is_decoder=True,
        initializer_range=0.3,
    ),
}
HEAD_ALONE = {"gpt2", "llama"}  # the logits are the head's, nothing more


@functools.cache
def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGURATIONS[name]()).eval().requires_grad_(False)


def text(count: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count)


def token_by_token(model: Any, made: list[Window], dtype: torch.dtype = torch.float64) -> NDArray[np.float64]:
    """The definition: for each scored token one forward pass over its window before it, in double precision."""
    exact = copy.deepcopy(model).to(dtype)
    found = []
    for window in made:
        for place in range(len(window.ids) - window.scored, len(window.ids)):
            with torch.no_grad():
                logits = exact(torch.from_numpy(window.ids[None, :place])).logits[0, -1].double()
            found.append(-torch.log_softmax(logits, -1)[window.ids[place]].item())
    return np.array(found)


def plans(ids: NDArray[np.int64]) -> dict[str, list[Window]]:
    return {
        "chunk": protocols.chunk(ids, 16, 3),
        "stride": protocols.stride(ids, 16, 5),
        "half": protocols.half(ids, 16, 3),
        "rolling": protocols.rolling(ids, 16, 3),
        "sentence": protocols.sentence([ids[:7], ids[7:7], ids[8:9], ids[9:30]], 32, None),
    }


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_engine_is_the_definition_token_by_token(name: str) -> None:
    model = model_of(name)
    for protocol, made in plans(text(36)).items():
        expected = token_by_token(model, made)
        assert expected.std() > 0.1  # the model does distinguish tokens
        np.testing.assert_allclose(engine.score(model, made, device="cpu"), expected, atol=1e-4, err_msg=protocol)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_head_that_is_not_all_of_the_logits_is_found(name: str) -> None:
    with torch.inference_mode():
        assert engine.splits(model_of(name), text(16), "cpu") is (name in HEAD_ALONE)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("batch_size", [0, 2, 3, 8])
def test_batches_change_nothing_and_keep_the_order(name: str, batch_size: int) -> None:
    model = model_of(name)
    for made in plans(text(60, seed=1)).values():
        alone = engine.score(model, made, device="cpu")
        together = engine.score(model, made, device="cpu", batch_size=batch_size)
        assert np.abs(alone - together).max() < 1e-4
        assert abs(float(alone.mean() - together.mean())) < 1e-5


def test_padding_is_never_scored_nor_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    made = [protocols.all_but_first(text(length, seed=length)) for length in (5, 12, 3, 9)]
    results = []
    for padding in (0, 7, 60):
        monkeypatch.setattr(engine, "PADDING", padding)
        results.append(engine.score(model, made, device="cpu", batch_size=4))
    assert len(results[0]) == 4 + 11 + 2 + 8
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_a_mask_is_given_only_where_lengths_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2")
    seen: list[tuple[tuple[int, ...], bool]] = []
    run = model.transformer.forward

    def spy(*arguments: Any, **more: Any) -> Any:
        if "input_ids" in more and more["input_ids"].shape[0] > 1:  # the probe gives whole models theirs
            seen.append((tuple(more["input_ids"].shape), "attention_mask" in more))
        return run(*arguments, **more)

    monkeypatch.setattr(model.transformer, "forward", spy)
    made = [protocols.all_but_first(text(length)) for length in (6, 9, 9, 9, 9, 5)]
    engine.score(model, made, device="cpu", batch_size=2)
    assert seen[-3:] == [((2, 8), False), ((2, 8), False), ((2, 5), True)]  # a probe may come before


@pytest.mark.parametrize(
    ("lengths", "size", "wanted"),
    [
        ([600, 512, 300, 256, 200, 9, 9], 0, [1, 1, 1, 2, 2]),
        ([128] * 5, 0, [4, 1]),
        ([128] * 5, 1, [1] * 5),
        ([128] * 5, 3, [3, 2]),
        ([], 0, []),
    ],
)
def test_a_chosen_batch_holds_so_many_tokens(lengths: list[int], size: int, wanted: list[int]) -> None:
    assert [len(lengths[part]) for part in engine.batches(lengths, size)] == wanted


def test_no_more_logits_than_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    made = plans(text(60))["rolling"]
    whole = engine.score(model, made, device="cpu", batch_size=4)
    monkeypatch.setattr(engine, "LOGITS_BYTES", 3 * VOCABULARY * 4 + 1)
    rows: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, given, out: rows.append(out.shape[0]))
    try:
        sliced = engine.score(model, made, device="cpu", batch_size=4)
    finally:
        hook.remove()
    assert max(rows) == 3
    assert sum(rows) == 60
    np.testing.assert_allclose(sliced, whole, atol=1e-5)


def test_windows_that_score_nothing_are_not_run() -> None:
    def refuse(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("ran")

    model = nn.Module()
    model.forward = refuse
    assert engine.score(model, [], device="cpu").shape == (0,)
    assert engine.score(model, [Window(text(1), 0), Window(text(0), 0)], device="cpu").dtype == np.float32


def test_a_broken_weight_shows_in_every_token_it_reaches() -> None:
    model = copy.deepcopy(model_of("llama"))
    model.lm_head.weight[5] = float("nan")
    assert np.isnan(engine.score(model, plans(text(30))["chunk"], device="cpu")).all()


def test_score_multiplies_in_fp32_where_the_processor_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(model_of("gpt2")).bfloat16()
    made = plans(text(40))["chunk"]
    monkeypatch.setattr(cpu, "native", lambda dtype: True)
    plain = engine.score(model, made, device="cpu")
    used: list[Any] = []
    product = cpu.conv1d_in_fp32

    def spy(module: Any, x: torch.Tensor) -> torch.Tensor:
        used.append(module)
        return product(module, x)

    monkeypatch.setattr(cpu, "conv1d_in_fp32", spy)
    monkeypatch.setattr(cpu, "native", lambda dtype: dtype == torch.float32)
    emulated = engine.score(model, made, device="cpu")
    assert len(set(used)) == 8  # four projections in each of two layers
    assert np.abs(plain - emulated).mean() < 0.05  # nats: rounding of a bf16 layer moves later ones
    exact = token_by_token(model, made)  # the rounded weights without any further rounding
    assert np.abs(emulated - exact).mean() <= 1.5 * np.abs(plain - exact).mean()


@pytest.mark.parametrize("rows", [[0.5, -3.0, 88.0], [-torch.inf] * 3, [torch.inf, 1.0, 2.0], [torch.nan, 1.0, 2.0]])
def test_logsumexp_in_place_is_torchs_to_the_bit(rows: list[float]) -> None:
    logits = torch.stack((torch.tensor(rows), torch.randn(3, generator=torch.Generator().manual_seed(0)) * 30))
    wanted = logits.logsumexp(-1)
    kept = logits.clone()
    assert torch.equal(engine._logsumexp(kept, spent=False).nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert torch.equal(kept.nan_to_num(7.0), logits.nan_to_num(7.0))
    assert torch.equal(engine._logsumexp(kept, spent=True).nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [1, 3, 0])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_two_windows_at_once_give_the_same_bits(name: str, batch: int, two_threads: None) -> None:
    model, made = model_of(name), protocols.half(text(300), 16, 3)
    together = engine.score(model, made, device="cpu", batch_size=batch, concurrent=True)
    first = engine.score(model, made[:1], device="cpu", concurrent=True)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)  # each window's share
    np.testing.assert_array_equal(together, engine.score(model, made, device="cpu", batch_size=batch))
    np.testing.assert_array_equal(first, engine.score(model, made[:1], device="cpu"))


def test_windows_run_two_at_a_time_each_on_its_share_of_the_threads(two_threads: None) -> None:
    model, seen, both = copy.deepcopy(model_of("llama")), set(), threading.Barrier(2, timeout=20)

    def watch(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():  # the probe for the head runs there
            both.wait()  # breaks unless a second window is under way
            seen.add(torch.get_num_threads())

    model.base_model.register_forward_pre_hook(watch)
    engine.score(model, protocols.chunk(text(64), 16, None), device="cpu", concurrent=True)
    assert seen == {1}


def test_long_windows_and_models_that_keep_a_state_run_alone(two_threads: None) -> None:
    model, names = copy.deepcopy(model_of("llama")), set()
    model.base_model.register_forward_pre_hook(lambda *_: names.add(threading.current_thread().name))
    engine.score(model, protocols.chunk(text(64), 16, None), device="cpu")
    engine.score(model, protocols.chunk(text(1200), 600, None), device="cpu", concurrent=True)
    assert names == {threading.main_thread().name}


def test_an_error_beside_another_window_is_raised_and_the_threads_come_back(two_threads: None) -> None:
    model = copy.deepcopy(model_of("llama"))

    def fail(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("no memory")

    model.base_model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        engine.score(model, protocols.chunk(text(64), 16, None), device="cpu", concurrent=True)
    assert torch.get_num_threads() == 2


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 24}
STRETCHED = {
    "longrope": LONG | {"long_factor": [1.0, 2.0, 3.0, 4.0], "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}


@pytest.mark.parametrize("kind", STRETCHED)
def test_a_window_s_figure_is_its_own_whatever_runs_beside_or_before_it(kind: str, two_threads: None) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, max_position_embeddings=24, rope_parameters=STRETCHED[kind])
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    made = [protocols.all_but_first(text(length, seed=length)) for length in (12, 60, 24, 26, 40, 40, 60, 9, 25)]
    fresh = [engine.score(copy.deepcopy(model), [window], device="cpu") for window in made]
    for batch in (1, 3, 7, 0):
        for _ in range(2):  # the second time behind the longest
            found = engine.score(model, made, device="cpu", batch_size=batch, concurrent=True)
            np.testing.assert_allclose(found, np.concatenate(fresh), atol=1e-4)
    again = [
        engine.compare_predictions(model, copy.deepcopy(model), [made[1], window], device="cpu") for window in made
    ]
    assert all(one.kl.max() < 1e-6 for one in again)


def test_windows_are_not_padded_where_that_moves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = copy.deepcopy(model_of("llama")), list[list[int]]()
    turn = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: turn(x, position_ids * x.shape[1])  # by the longest row

    def seen(model: Any, chosen: list[Window], *_: Any) -> NDArray[np.float32]:
        shapes.append([len(one.ids) for one in chosen])
        return np.zeros(sum(one.scored for one in chosen), np.float32)

    monkeypatch.setattr(engine, "batch_nll", seen)
    made = [protocols.all_but_first(text(length)) for length in (9, 9, 6, 6, 5)]
    engine.score(model, made, device="cpu", batch_size=3)
    assert shapes == [[9, 9], [6, 6], [5]]


@pytest.mark.parametrize("decoder", [True, False])
def test_a_model_that_looks_ahead_is_found(decoder: bool) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, num_attention_heads=4, is_decoder=decoder, initializer_range=0.3)
    model = transformers.BertLMHeadModel(config).eval()
    for ids in (text(40), text(2), np.full(20, 7), np.zeros(20, dtype=np.int64)):
        assert engine.looks_ahead(model, ids, "cpu") is not decoder


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_causal_model_does_not_look_ahead(name: str) -> None:
    model = model_of(name)
    assert not engine.looks_ahead(model, text(40), "cpu")
    assert not engine.looks_ahead(copy.deepcopy(model).bfloat16(), text(40), "cpu")
