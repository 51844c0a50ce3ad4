"""Every core method on the pretended card: perplexity equals the CPU's to the bit, bytes and peaks are the card's."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.rehearsal.conftest import TINY, WIDE, vocabulary
from tests.rehearsal.measuring import CORE, Plan, hold_peaks, hold_prediction, hold_proof, on_cpu, run

PEAKS = ("memory.load_peak", "memory.run_peak")
PlanOf = Callable[[str], Plan]


@pytest.fixture(autouse=True)
def short_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward of memory.run_peak, 512 tokens, is most of a wide model's time here."""
    monkeypatch.setattr("harness.metrics.memory.WINDOW", 64)


def compare(plan: Plan, method: str, tokens: int) -> None:
    """One method on both devices."""
    there = run(plan.with_metrics("perplexity", "memory", *PEAKS), method, "cuda")
    here = run(plan, on_cpu(method), "cpu")
    assert here.rows.keys() == there.rows.keys() - set(PEAKS)
    for name, row in here.rows.items():
        assert there.rows[name].value == row.value, name
    assert there.rows["perplexity"].nll == here.rows["perplexity"].nll != ""  # the losses' hash: every token's
    assert there.rows["memory.storage"].detail["predicted_equal"]
    hold_peaks(there.rows, tokens)
    hold_prediction(plan, method, there.rows)
    hold_proof(there.rows["perplexity"])
    assert there.copies == 0, "a forward fetches something from the host"
    assert there.left == 0, "something lies on the card when all is over"


@pytest.mark.parametrize("method", CORE)
@pytest.mark.parametrize("model", TINY)
def test_tiny_model(model: str, method: str, plan_of: PlanOf) -> None:
    compare(plan_of(model), method, vocabulary(model))


@pytest.mark.parametrize("method", CORE)
@pytest.mark.parametrize("model", WIDE)
def test_true_widths(model: str, method: str, plan_of: PlanOf) -> None:
    compare(plan_of(model), method, vocabulary(model))
