import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from harness.core.contracts import TokenPlan, Window
from harness.core.errors import HarnessError, LeftOut
from harness.core.records import Figure
from harness.core.specification import parse
from harness.inputs.texts import protocols
from harness.inputs.texts.corpora import Corpus
from harness.metrics import perplexity
from harness.metrics.measuring import engine

VOCABULARY = 50
MEMBERS = {member.name: member for member in perplexity.METRIC.members}


def plan_of(scored: list[int], aggregate: str = "token", **normalisers: int) -> TokenPlan:
    made = tuple(Window(np.arange(count + 1), count) for count in scored)
    return TokenPlan("p", "p", "h", sum(scored), made, aggregate, normalisers)


def measured(name: str, plan: TokenPlan, nll: list[float], reference: list[float] | None = None) -> Figure:
    def array(values: list[float] | None) -> NDArray[np.float32]:
        return np.array(values, dtype=np.float32)

    subject: Any = SimpleNamespace(plan=plan, nll=lambda: array(nll), reference_nll=lambda: array(reference))
    return perplexity.METRIC.measure(subject, MEMBERS[name])


def test_perplexity_by_hand() -> None:
    figure = measured("perplexity", plan_of([2, 0, 1]), [1.0, 2.0, 6.0])
    assert figure.value == pytest.approx(math.exp(3))
    assert (figure.unit, figure.count) == ("ppl", 3)
    assert figure.detail == {"scored": 3, "windows": 2, "unscored_windows": 1, "non_finite": 0, "mean_nll": 3.0}
    # windows sum to 3 over 2 tokens and 6 over 1: residuals 3 - 2 * 3 and 6 - 3; SE = sqrt(2 / 1 * (9 + 9)) / 3 = 2
    assert figure.spread == pytest.approx(2 * math.exp(3))
    assert measured("perplexity", plan_of([3]), [1.0, 2.0, 6.0]).spread is None


def test_spread_of_equal_windows_is_the_textbook_standard_error() -> None:
    nll = np.random.default_rng(0).normal(3, 1, 40)
    figure = measured("perplexity", plan_of([4] * 10), nll.tolist())
    means = nll.astype(np.float32).astype(np.float64).reshape(10, 4).mean(1)
    assert figure.spread == pytest.approx(figure.value * means.std(ddof=1) / math.sqrt(10), rel=1e-6)


def test_gptq_averages_windows() -> None:
    assert measured("perplexity", plan_of([2, 1], "window"), [1.0, 2.0, 6.0]).value == pytest.approx(math.exp(3.75))


def test_delta_is_the_log_of_the_ratio_of_the_perplexities() -> None:
    rng = np.random.default_rng(1)
    reference = rng.normal(3, 1, 90).astype(np.float32)
    candidate = (reference + rng.normal(0.1, 0.2, 90)).astype(np.float32)
    for plan in (plan_of([9] * 10), plan_of([1, 8] * 10), plan_of([9] * 10, "window")):
        pair = (candidate.tolist(), reference.tolist())
        figure = measured("perplexity.delta", plan, *pair)
        ratio = measured("perplexity", plan, pair[0]).value / measured("perplexity", plan, pair[1]).value
        assert figure.value == pytest.approx(math.log(ratio), abs=1e-12)
        assert figure.detail["ratio"] == pytest.approx(ratio)
        assert figure.interval is not None
        assert figure.interval[0] < figure.value < figure.interval[1]
        assert (figure.unit, figure.count) == ("nat", len(plan.windows))
        assert figure.detail["usable"] is True


def test_delta_of_a_model_to_itself_is_nothing_and_few_windows_are_unusable() -> None:
    figure = measured("perplexity.delta", plan_of([2, 0, 1]), [1.0, 2.0, 6.0], [1.0, 2.0, 6.0])
    assert (figure.value, figure.interval, figure.count) == (0.0, (0.0, 0.0), 2)
    assert figure.detail["same_tokens"] == 3
    assert figure.detail["usable"] is False


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_never_averaged_away(broken: float) -> None:
    losses = [1.0, broken, 2.0]
    plan = plan_of([1, 2], word=2, byte=9)
    figure = measured("perplexity", plan, losses)
    assert not math.isfinite(figure.value)
    assert (figure.detail["non_finite"], figure.spread) == (1, None)
    delta = measured("perplexity.delta", plan, losses, [1.0, 1.0, 1.0])
    assert math.isnan(delta.value)
    assert (delta.detail["non_finite"], delta.detail["reference_non_finite"], delta.detail["usable"]) == (1, 0, False)
    assert measured("perplexity.delta", plan, [1.0, 1.0, 1.0], losses).detail["reference_non_finite"] == 1
    for name in ("perplexity.word", "perplexity.byte", "perplexity.bits_per_byte"):
        assert not math.isfinite(measured(name, plan, losses).value)


def test_per_word_and_byte_by_hand() -> None:
    plan = plan_of([2, 1], word=2, byte=12)
    losses = [1.0, 2.0, 6.0]  # 9 nats
    assert measured("perplexity.word", plan, losses).value == pytest.approx(math.exp(4.5))
    assert measured("perplexity.byte", plan, losses).value == pytest.approx(math.exp(0.75))
    bits = measured("perplexity.bits_per_byte", plan, losses)
    assert bits.value == pytest.approx(9 / 12 / math.log(2))
    assert bits.unit == "bit/byte"
    assert bits.spread == pytest.approx(2 * 3 / 12 / math.log(2))  # SE of the mean is 2 nats over 3 tokens
    with pytest.raises(HarnessError, match=r"perplexity\.word: the tokenizer cannot say how many words"):
        measured("perplexity.word", plan_of([2, 1]), losses)


def test_a_text_without_blanks_has_no_words_and_no_infinity() -> None:
    losses = [4.0] * 500  # 2000 nats in one word: its perplexity would be infinite
    plan = plan_of([250, 250], word=1, byte=1500)
    with pytest.raises(LeftOut, match="white space parts this text into 1 word of 1,500 bytes each"):
        measured("perplexity.word", plan, losses)
    assert measured("perplexity.byte", plan, losses).value == pytest.approx(math.exp(2000 / 1500))
    assert measured("perplexity.bits_per_byte", plan, losses).value == pytest.approx(2000 / 1500 / math.log(2))
    measured("perplexity.word", plan_of([250, 250], word=30, byte=1500), losses)  # 50 bytes: as in Thai, still words


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)


def recipe_windows(model: Any, ids: torch.Tensor, width: int, step: int) -> Iterator[tuple[float, int, int]]:
    """Hugging Face's perplexity recipe: (the model's own loss, labels that count for its weight, tokens predicted)."""
    previous = 0
    for begin in range(0, len(ids), step):
        end = min(begin + width, len(ids))
        fresh = end - previous
        labels = ids[begin:end].clone()
        labels[: len(labels) - fresh] = -100
        with torch.no_grad():
            loss = model(ids[None, begin:end], labels=labels[None]).loss.item()
        yield loss, int((labels != -100).sum()) - 1, int((labels[1:] != -100).sum())
        previous = end
        if end == len(ids):
            return


def recipe_perplexity(model: Any, ids: torch.Tensor, width: int, step: int) -> float:
    parts = [(loss, weight) for loss, weight, _ in recipe_windows(model, ids, width, step)]
    return math.exp(sum(loss * weight for loss, weight in parts) / sum(weight for _, weight in parts))


def scored(model: Any, made: list[Window]) -> tuple[float, TokenPlan]:
    plan = TokenPlan("p", "p", "h", 0, tuple(made), "token")
    return protocols.aggregate(engine.score(model, made, device="cpu"), plan), plan


def test_chunk_equals_the_recipe_at_stride_of_the_width(model: Any) -> None:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 130)
    ours, _ = scored(model, protocols.chunk(ids, 32, None))
    assert ours == pytest.approx(recipe_perplexity(model, torch.from_numpy(ids), 32, 32), rel=1e-6)


def test_stride_differs_from_the_recipe_by_its_weights_alone(model: Any) -> None:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 200)
    ours, plan = scored(model, protocols.stride(ids, 32, 16))
    recipe = recipe_perplexity(model, torch.from_numpy(ids), 32, 16)
    assert 0 < abs(ours / recipe - 1) < 0.01  # the recipe weights an overlapping window by one token too few
    parts = list(recipe_windows(model, torch.from_numpy(ids), 32, 16))
    assert [count for _, _, count in parts] == [window.scored for window in plan.windows]
    counted = math.exp(sum(loss * count for loss, _, count in parts) / sum(count for _, _, count in parts))
    assert ours == pytest.approx(counted, rel=1e-6)


def harness_rolling(tokens: list[int], prefix: int, longest: int) -> list[tuple[list[int], list[int]]]:
    """The rolling windows that lm-evaluation-harness describes: (fed, predicted), context of one token."""
    count = len(tokens)
    first = min(longest, count)
    made = [([prefix, *tokens[: first - 1]], tokens[:first])]
    done = first
    while done < count:
        fresh = min(count - done, longest)
        end = done + fresh
        made.append((tokens[end - longest - 1 : end - 1], tokens[done:end]))
        done = end
    return made


@pytest.mark.parametrize("count", [1, 5, 16, 17, 31, 32, 33, 50])
def test_rolling_feeds_and_predicts_what_lm_evaluation_harness_does(count: int) -> None:
    tokens = np.random.default_rng(count).integers(0, VOCABULARY, count)
    ours = [
        (window.ids[:-1].tolist(), window.ids[-window.scored :].tolist()) for window in protocols.rolling(tokens, 16, 7)
    ]
    assert ours == harness_rolling(tokens.tolist(), 7, 16)


def words_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    names = ["<s>", "</s>", *(f"w{number}" for number in range(VOCABULARY - 2))]
    inner = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def test_real_tokenizers_keep_their_bos_rule_and_identity() -> None:
    text = " ".join(f"w{number % 40}" for number in range(100))
    corpus = Corpus("sample", (text,), "file", "0" * 64)

    def plan(name: str, tokenizer: PreTrainedTokenizerFast, limit: int | None = None) -> TokenPlan:
        return protocols.plan(corpus, protocols.parse(parse(name)), tokenizer, context=64, max_tokens=limit)

    plain, led = plan("chunk:16", words_tokenizer(False)), plan("chunk:16", words_tokenizer(True))
    assert plain.windows[0].ids[:3].tolist() == [2, 3, 4]
    assert led.windows[1].ids[:3].tolist() == [0, 17, 18]
    assert plain.token_hash == led.token_hash
    assert "bos=0" in plain.protocol_id
    assert "bos=1 (id 0)" in led.protocol_id
    assert protocols.tokenizer_identity(words_tokenizer(False)) in led.protocol_id  # the vocabulary is the same
    assert plan("rolling:16", words_tokenizer(False), 3).normalisers == {"word": 3, "byte": len("w0 w1 w2")}
