"""Faults of a kind that only a card shows, put in on purpose: what the rehearsal holds must catch each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from harness.core import errors
from harness.methods.quantizing import stored
from harness.metrics import memory
from harness.metrics.measuring import engine
from harness.metrics.measuring.devices import Cuda
from harness.metrics.measuring.timing import Work
from harness.run.group import failure
from tests.rehearsal.card import Card, pretended
from tests.rehearsal.conftest import vocabulary
from tests.rehearsal.measuring import Plan, group_of, hold_peaks, run

MODEL, METHOD = "tiny-gpt2", "nf4"
PEAKS = ("memory", "memory.load_peak", "memory.run_peak")
PlanOf = Callable[[str], Plan]


@pytest.fixture
def card(one_thread: None) -> Iterator[Card]:
    with pretended() as found:
        yield found


def test_a_table_left_on_the_host(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stored.Tables.__init__

    def on_host(self: Any, recipe: Any, device: torch.device, *rest: Any) -> None:
        made(self, recipe, torch.device("cpu"), *rest)

    monkeypatch.setattr(stored.Tables, "__init__", on_host)
    with pytest.raises(RuntimeError, match="same device"):
        run(plan_of(MODEL), METHOD, "cuda")


def test_a_table_fetched_at_every_forward(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    at_hand = stored.StoredWeight.dequantize

    def fetching(self: Any) -> torch.Tensor:
        return at_hand(self) * torch.ones(1).to("cuda")

    monkeypatch.setattr(stored.StoredWeight, "dequantize", fetching)
    assert run(plan_of(MODEL).with_metrics("memory.run_peak"), METHOD, "cuda").copies > 0


def test_a_timing_without_synchronise(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(4, device="cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(RuntimeError, match="device not ready"):
        Cuda().time(lambda: x.add_(1))


def test_a_repetition_that_hides_behind_another(card: Card) -> None:
    large, small = torch.ones(2**24, device="cuda"), torch.ones(4, device="cuda")

    def many_small_kernels() -> None:
        for _ in range(20):
            small.add_(1)

    device = Cuda()
    (alone,) = device.time(many_small_kernels)
    _, behind = device.time(lambda: large.add_(1), many_small_kernels)
    assert behind == pytest.approx(alone)
    _, prepared = device.time(lambda: None, Work(many_small_kernels, lambda: large.add_(1)))
    assert prepared == pytest.approx(alone)


def test_losses_read_before_they_arrived(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(MODEL).with_metrics("perplexity")
    right = run(plan, METHOD, "cuda").rows["perplexity"]
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: self.to("cpu", non_blocking=True))
    wrong = run(plan, METHOD, "cuda").rows["perplexity"]
    assert wrong.nll != right.nll


def test_a_peak_read_before_the_forward(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_forward", lambda subject, model, length: None)
    rows = run(plan_of(MODEL).with_metrics(*PEAKS), METHOD, "cuda").rows
    with pytest.raises(AssertionError, match="before the forward"):
        hold_peaks(rows, vocabulary(MODEL))


def test_the_pool_reported_for_its_tensors(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PEAKS", ("resident", "reserved", "allocated"))
    rows = run(plan_of(MODEL).with_metrics(*PEAKS), METHOD, "cuda").rows
    with pytest.raises(AssertionError, match="a peak is of tensors"):
        hold_peaks(rows, vocabulary(MODEL))


def test_a_tensor_kept_on_the_card(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, own = list[torch.Tensor](), engine.sliced_nll

    def keeping(rows: torch.Tensor, *rest: Any) -> Any:
        kept.append(rows)
        return own(rows, *rest)

    monkeypatch.setattr(engine, "sliced_nll", keeping)
    assert run(plan_of(MODEL).with_metrics("perplexity"), METHOD, "cuda").left == len(kept) > 0


@pytest.mark.parametrize("method", ["fp16", "bnb-nf4"])
def test_a_model_that_does_not_fit(method: str, plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The want is met in transformers' conversion of a weight, which keeps what was raised for a report."""
    monkeypatch.setattr("transformers.modeling_utils.caching_allocator_warmup", lambda *_: None)
    with group_of(plan_of(MODEL), method, "cuda", total=2**20) as (group, _):
        with pytest.raises(Exception, match=r".") as caught:
            group.model  # noqa: B018
        reply = failure(caught.value)
    assert (reply.kind, reply.blamed) == ("error", errors.MEMORY)
    assert reply.text.startswith("out of memory on the card: ")
    assert group.predicted["memory.storage"] > 0  # which the controller adds to the line
