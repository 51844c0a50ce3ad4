"""Divergences by hand on tiny logits, and on a small random GPT-2 against whole logits in double precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from harness.core.contracts import Subject, TokenPlan, Window
from harness.core.errors import HarnessError
from harness.core.records import Case, Figure
from harness.core.stats import paired_delta
from harness.inputs.texts import protocols
from harness.metrics import divergence
from harness.metrics.measuring import engine
from harness.metrics.measuring.devices import Cpu

VOCABULARY = 61
MEMBERS = {member.name: member for member in divergence.METRIC.members}
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.3}
LLAMA = SIZES | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def gpt2(context: int = 128) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=context)
    return transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)


def granite() -> Any:
    torch.manual_seed(0)
    config = transformers.GraniteConfig(**LLAMA, logits_scaling=3.0)  # logits are not the head's alone
    return transformers.GraniteForCausalLM(config).eval().requires_grad_(False)


def shaken(model: Any, size: float) -> Any:
    """A copy with noise of a relative size on every weight."""
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + size * torch.randn_like(parameter))
    return other


def made(scored: int = 9) -> list[Window]:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 40 * scored)
    return [*protocols.chunk(ids, 40, None), Window(ids[:5], 0), *protocols.stride(ids[:90], 40, 15)]


@dataclass(eq=False)
class Fake:
    """Enough of a Subject."""

    model: Any
    reference: Any
    plan: TokenPlan
    device: Cpu = field(default_factory=Cpu)
    case: Case = field(default_factory=lambda: Case("m", "nf4", "lee", "chunk:40", "divergence.kl", "cpu"))


def measured(fake: Fake, name: str) -> Figure:
    return divergence.METRIC.measure(cast(Subject, fake), MEMBERS[f"divergence.{name}"])


def plan_of(chosen: list[Window], token_hash: str = "h") -> TokenPlan:
    return TokenPlan("chunk:40", "p", token_hash, sum(len(window.ids) for window in chosen), tuple(chosen), "token")


def test_divergences_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]]), torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    kl, same, change = engine.divergences(p.log() + 3, q.log() - 1, torch.tensor([0, 1]))
    # 0.5 ln 2 + 0.25 ln 0.5 = 0.25 ln 2; 0.2 ln 2 + 0.7 ln(7/8)
    expected = [0.25 * math.log(2), 0.2 * math.log(2) + 0.7 * math.log(7 / 8)]
    assert kl.tolist() == pytest.approx(expected, abs=1e-6)
    assert same.tolist() == [False, True]
    assert change.tolist() == pytest.approx([-0.25, 0.1], abs=1e-6)


def test_an_impossible_token_costs_nothing_in_the_reference_and_everything_in_the_candidate() -> None:
    never = -math.inf
    far, _, _ = engine.divergences(torch.tensor([[0.0, -95.0]]), torch.tensor([[-95.0, 0.0]]), torch.tensor([0]))
    assert far.tolist() == pytest.approx([95.0])
    p = torch.tensor([[0.0, 0.0, never], [0.0, 0.0, 0.0], [0.0, 0.0, never]])
    q = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, never], [0.0, 0.0, never]])
    kl, _, _ = engine.divergences(p, q, torch.tensor([0, 0, 0]))
    assert kl.tolist() == pytest.approx([math.log(3 / 2), math.inf, 0.0], abs=1e-6)


def test_small_divergences_keep_their_digits() -> None:
    torch.manual_seed(0)
    p = 5 * torch.randn(20, 50_000)
    q = p + 1e-3 * torch.randn_like(p)
    kl, _, _ = engine.divergences(p, q, torch.zeros(20, dtype=torch.long))
    ln_p, ln_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    expected = (ln_p.exp() * (ln_p - ln_q)).sum(-1)  # about 5e-7 nats
    assert expected.max() < 2e-6
    assert ((kl - expected).abs() / expected).max() < 1e-3


def whole(model: Any, window: Window) -> Tensor:
    """(k, V) log probabilities of a window's scored tokens, in double precision, from whole logits."""
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(torch.from_numpy(window.ids[None])).logits[0]
    return cast(Tensor, logits[len(window.ids) - 1 - window.scored : -1].log_softmax(-1))


@pytest.mark.parametrize("build", [gpt2, granite])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_compare_equals_whole_logits(build: Callable[[], Any], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LOGITS_BYTES", rows * 8 * VOCABULARY)
    reference = build()
    candidate, chosen = shaken(reference, 0.05), made()
    found = engine.compare_predictions(reference, candidate, chosen, device="cpu")
    kl, same, change = [], [], []
    for window in chosen:
        if window.scored:
            ln_p, ln_q = whole(reference, window), whole(candidate, window)
            true = torch.from_numpy(window.ids[-window.scored :])[:, None]
            kl.append(nn.functional.kl_div(ln_q, ln_p, log_target=True, reduction="none").sum(-1))
            same.append(ln_p.argmax(-1) == ln_q.argmax(-1))
            change.append((ln_q.exp() - ln_p.exp()).gather(-1, true)[:, 0])
    assert len(found.kl) == sum(window.scored for window in chosen)
    assert found.kl.mean() > 1e-3
    np.testing.assert_allclose(found.kl, torch.cat(kl), atol=2e-5)
    assert (found.same_top == torch.cat(same).numpy()).mean() > 0.999  # rounding may turn a tie
    np.testing.assert_allclose(found.change, torch.cat(change), atol=1e-5)


def test_change_of_the_true_token_is_what_the_engine_scores() -> None:
    reference = gpt2()
    candidate, chosen = shaken(reference, 0.05), made()
    found = engine.compare_predictions(reference, candidate, chosen, device="cpu")
    ours, theirs = (np.exp(-engine.score(model, chosen, device="cpu")) for model in (candidate, reference))
    np.testing.assert_allclose(found.change, ours - theirs, atol=1e-6)


def test_a_model_does_not_diverge_from_itself() -> None:
    model = gpt2()
    fake = Fake(model, copy.deepcopy(model), plan_of(made()))
    assert measured(fake, "kl").value == 0.0
    assert measured(fake, "kl").detail["max"] == 0.0
    assert measured(fake, "same_top").value == 1.0
    assert measured(fake, "rms_dp").value == 0.0
    first = measured(fake, "first_divergence")
    assert (first.value, first.count, first.samples) == (64.0, 4, (64.0,) * 4)
    assert first.detail == {"prompt_tokens": 32, "new_tokens": 64, "never": 4}


def test_figures_come_from_one_comparison_with_intervals_over_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, chosen = gpt2(), made()
    fake = Fake(shaken(reference, 0.05), reference, plan_of(chosen))
    found = engine.compare_predictions(fake.reference, fake.model, chosen, device="cpu")
    runs: list[int] = []
    compare = engine.compare_predictions

    def counted(*given: Any, **more: Any) -> engine.Divergence:
        runs.append(1)
        return compare(*given, **more)

    monkeypatch.setattr(engine, "compare_predictions", counted)
    kl, top, rms = (measured(fake, name) for name in ("kl", "same_top", "rms_dp"))
    assert len(runs) == 1
    ends = np.cumsum([window.scored for window in chosen if window.scored])
    spans = [slice(end - window.scored, end) for end, window in zip(ends, [w for w in chosen if w.scored], strict=True)]
    estimate = paired_delta(found.kl, np.zeros(len(found.kl)), spans)
    assert kl.value == pytest.approx(found.kl.mean(dtype=np.float64))
    assert kl.interval == (estimate.low, estimate.high)
    assert kl.count == len(found.kl)
    assert kl.detail["median"] == pytest.approx(np.median(found.kl))
    assert kl.detail["p99"] == pytest.approx(np.percentile(found.kl, 99), rel=1e-5)
    assert kl.detail["max"] == found.kl.max()
    assert (kl.detail["windows"], kl.detail["usable"], kl.detail["non_finite"]) == (len(spans), True, 0)
    assert top.value == found.same_top.mean()
    assert 0.0 <= top.interval[0] < top.value < top.interval[1] <= 1.0  # type: ignore[index]
    assert rms.value == pytest.approx(np.sqrt((found.change.astype(np.float64) ** 2).mean()))
    assert rms.interval[0] < rms.value < rms.interval[1]  # type: ignore[index]
    assert rms.detail["p5"] == pytest.approx(np.percentile(found.change, 5), abs=1e-7)
    assert rms.detail["largest"] == np.abs(found.change).max()
    assert [figure.unit for figure in (kl, top, rms)] == ["nat", "share", "probability"]
    fake.plan = plan_of(chosen[:4], "other")  # another plan is another comparison
    assert measured(fake, "kl").detail["usable"] is False
    assert len(runs) == 2


def continuation(model: Any, prompt: list[int], new: int) -> list[int]:
    """Greedy, without a cache: each token from a fresh forward of all before it."""
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_first_divergence_is_where_two_greedy_continuations_part() -> None:
    reference = gpt2()
    seen = set()
    for size in (0.002, 0.02, 0.5):
        candidate = shaken(reference, size)
        fake = Fake(candidate, reference, plan_of(made()))
        figure = measured(fake, "first_divergence")
        expected = []
        for prompt in divergence.prompts(cast(Subject, fake)):
            pairs = zip(*(continuation(model, prompt.tolist(), 64) for model in (reference, candidate)), strict=True)
            expected.append(next((place for place, (a, b) in enumerate(pairs) if a != b), 64))
        assert figure.samples == tuple(expected)
        assert figure.value == np.median(expected)
        assert figure.detail["never"] == expected.count(64)
        seen.update(expected)
    assert len(seen) > 2  # the sizes do tell


def test_prompts_are_spread_and_a_short_context_shrinks_the_continuation() -> None:
    model = gpt2(context=40)
    fake = Fake(model, model, plan_of(made()))
    assert measured(fake, "first_divergence").detail["new_tokens"] == 8
    prompts = divergence.prompts(cast(Subject, fake))
    long = [window.ids for window in fake.plan.windows if len(window.ids) >= 32]
    assert [len(prompt) for prompt in prompts] == [32] * 4
    np.testing.assert_array_equal(prompts[0], long[0][:32])
    np.testing.assert_array_equal(prompts[-1], long[-1][:32])
    fake.plan = plan_of([window for window in made() if len(window.ids) < 32])
    with pytest.raises(HarnessError, match="needs a window of 32 tokens, and chunk:40 gives none here: choose"):
        measured(fake, "first_divergence")
    fake = Fake(gpt2(context=32), None, plan_of([Window(np.arange(32), 31)]))
    with pytest.raises(HarnessError, match="a context of 32 tokens holds no continuation"):
        measured(fake, "first_divergence")


@pytest.mark.parametrize("side", [0, 1])
def test_a_prediction_that_is_no_number_stays_one(side: int) -> None:
    pair = [torch.zeros(1, 3), torch.zeros(1, 3)]
    pair[side][0, 1] = math.nan
    kl, _, change = engine.divergences(pair[0], pair[1], torch.tensor([0]))
    assert math.isnan(kl[0])
    assert math.isnan(change[0])


def test_a_broken_candidate_is_never_averaged_away() -> None:
    reference = gpt2()
    broken = copy.deepcopy(reference)
    with torch.no_grad():
        broken.transformer.ln_f.bias[0] = math.nan
    fake = Fake(broken, reference, plan_of(made()))
    scored = sum(window.scored for window in made())
    for name in ("kl", "rms_dp"):
        figure = measured(fake, name)
        assert math.isnan(figure.value)
        assert (figure.detail["non_finite"], figure.detail["usable"]) == (scored, False)


def test_every_member_is_paired_so_the_reference_is_not_planned() -> None:
    assert all(member.paired and member.core and member.textual for member in divergence.METRIC.members)
    assert set(MEMBERS) == {f"divergence.{name}" for name in ("kl", "same_top", "rms_dp", "first_divergence")}
