"""Every metric under every protocol on the pretended card: two methods with the tests, the whole matrix at length."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness.core import catalog
from tests.rehearsal.conftest import TINY, WIDE
from tests.rehearsal.measuring import CORE, Plan, hold_proof, on_cpu, run

PlanOf = Callable[[str], Plan]
SHORT = (("tiny-gpt2", "linear-int4-affine"), ("tiny-olmo", "bnb-int8"))
PROTOCOLS = "chunk:64,stride:64:32,gptq:64,rolling:64,half:64,sentence"
FEW_TOKENS = "sentence divergence.first_divergence"  # continues 32 tokens, which no sentence of the tiny texts has
MEMBERS = [member for metric in catalog.metrics().values() if not metric.apart for member in metric.members]
TIMED = [member.name for member in MEMBERS if member.timed]
RESIDENT = ("memory.load_peak", "memory.run_peak")  # of the process on a CPU
FIGURES = [member.name for member in MEMBERS if not (member.timed or member.needs_file or member.name in RESIDENT)]


@pytest.mark.parametrize(
    ("model", "method"),
    [
        pytest.param(model, method, marks=() if (model, method) in SHORT else pytest.mark.long)
        for model in (*TINY, *WIDE)
        for method in CORE
    ],
)
def test_every_metric_and_protocol(model: str, method: str, plan_of: PlanOf) -> None:
    plan = plan_of(model).with_protocols(PROTOCOLS)
    there = run(plan.with_metrics("all"), method, "cuda", without=(FEW_TOKENS,))
    here = run(plan.with_metrics(*FIGURES), on_cpu(method), "cpu", without=(FEW_TOKENS,))
    assert {name.split()[-1] for name in there.rows} == {*FIGURES, *TIMED, *RESIDENT} - (
        {member.name for member in MEMBERS if member.paired} if method == "fp32" else set()
    )
    for name, row in here.rows.items():
        assert there.rows[name].value == row.value, name
        assert there.rows[name].nll == row.nll, name
    for row in there.rows.values():
        hold_proof(row)
    assert there.left == 0


def test_times_of_the_reference_against_itself_are_one(plan_of: PlanOf) -> None:
    """The pretended clock has no noise, so what a timing adds of its own would show."""
    rows = run(plan_of("tiny-gpt2").with_metrics("latency.prefill", "latency.decode"), "fp32", "cuda").rows
    for row in rows.values():
        assert row.detail["log_ratio"] == pytest.approx(0, abs=1e-9)
        assert len(set(row.samples)) >= 1
        assert max(row.samples) == pytest.approx(min(row.samples))
        assert row.detail["device_seconds"] < row.value
