"""One judge: against a record of an earlier row, and against that row in its report, a figure is called the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from harness import judge
from harness.core import catalog
from harness.core.environment import Environment
from harness.core.records import Row, Verdict
from harness.judge.baselines import Recorded
from harness.judge.bounds import Bounds, load
from harness.judge.two_reports import compare

WORLD = Environment(torch="2.13.0", instructions="avx2 avx512", threads=2, machine="a" * 16)
BASE = np.random.default_rng(5).uniform(1, 4, 40).astype(np.float32)
ONE_WINDOW = np.concatenate([np.zeros(36), np.ones(4)])
SWING = np.repeat([1.0, -1.0] * 5, 4)  # by windows of four


@pytest.fixture(scope="module")
def bounds(tmp_path_factory: pytest.TempPathFactory) -> Bounds:
    return load(tmp_path_factory.mktemp("none"))


def row(metric: str, value: float | None, **more: Any) -> Row:
    member = catalog.member(metric)
    assert member is not None
    text = {"dataset": "lee", "protocol": "chunk:4", "protocol_id": "text: lee", "token_hash": "f" * 64}
    facts = {"model": "m", "method": "nf4", "metric": metric, "device": "cpu", "reference": "fp32"}
    return Row(**{**facts, **(text if member.textual else {}), "value": value, "unit": member.unit, **more})


def both(before: Row, now: Row, bounds: Bounds, losses: dict[str, NDArray[Any]] | None = None) -> Verdict:
    """The verdict of the two comparisons, which must be one."""
    held = {name: np.asarray(values, dtype=np.float32) for name, values in (losses or {}).items()}
    member = catalog.member(now.metric)
    assert member is not None
    recorded = Recorded.of_row(before, WORLD, "2026-11-22T03:00:00Z")
    judged = judge.judge(now, member, bounds=bounds, recorded=recorded, environment=WORLD, nll=held.get)
    (entry,) = compare([before], [now], held.get, held.get, bounds=bounds).entries
    assert judged.verdict_baseline is entry.verdict, (judged.reason, entry.reason)
    assert entry.verdict is not None
    return entry.verdict


WORDS = {"words": 20, "bytes": 20}  # that 40 scored tokens cover


def figure(metric: str, losses: NDArray[Any], reference: NDArray[Any]) -> float:
    """The figure of a metric that follows from losses."""
    total = float(losses.astype(np.float32).sum(dtype=np.float64))
    if metric == "perplexity.delta":
        return float((losses.astype(np.float32) - reference.astype(np.float32)).mean(dtype=np.float64))
    if metric == "perplexity.bits_per_byte":
        return total / 20 / math.log(2)
    return math.exp(total / (40 if metric == "perplexity" else 20))


@pytest.mark.parametrize("metric", ["perplexity", "perplexity.word", "perplexity.bits_per_byte", "perplexity.delta"])
@pytest.mark.parametrize("windows", [2, 10])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("moved", "paired", "by_value"),
    [
        (0.004 + 0.0001 * SWING, Verdict.WORSE, Verdict.WORSE),
        (-0.004 + 0.0001 * SWING, Verdict.BETTER, Verdict.BETTER),
        (5e-5 * np.ones(40), Verdict.WORSE, Verdict.WORSE),
        (np.zeros(40) + 2.4e-7, Verdict.WITHIN_NOISE, Verdict.WITHIN_NOISE),
        (0.08 * SWING, Verdict.WORSE, Verdict.WITHIN_NOISE),  # tokens far beyond rounding around no change at all
        (0.1 * ONE_WINDOW, Verdict.WORSE, Verdict.WORSE),
    ],
)
def test_losses(
    bounds: Bounds, metric: str, windows: int, kept: bool, moved: NDArray[Any], paired: Verdict, by_value: Verdict
) -> None:
    detail: dict[str, Any] = {"window_counts": [40 // windows] * windows, "reference_nll": "reference"}
    detail |= WORDS if metric in ("perplexity.word", "perplexity.bits_per_byte") else {}
    losses = {"then": BASE, "now": BASE + moved, "reference": BASE - 0.3}
    before, now = (
        row(metric, figure(metric, losses[name], losses["reference"]), nll=name, detail=detail)
        for name in ("then", "now")
    )
    assert both(before, now, bounds, losses if kept else {}) is (paired if kept else by_value)


@pytest.mark.parametrize("metric", ["perplexity", "perplexity.delta"])
def test_figures_of_the_same_losses_and_of_losses_that_are_lost(bounds: Bounds, metric: str) -> None:
    detail = {"window_counts": [4] * 10, "reference_nll": "reference"}
    before = row(metric, 2.0, nll="then", detail=detail)
    found = [
        both(before, row(metric, value, nll=nll, detail=detail), bounds)
        for value, nll in ((2.0, "then"), (2.0 + 1e-12, "then"), (2.1, "then"), (2.1, "now"), (2.0 + 1e-8, "now"))
    ]
    assert found == [Verdict.SAME, Verdict.SAME, Verdict.WORSE, Verdict.WORSE, Verdict.WITHIN_NOISE]


def test_a_report_is_the_same_as_itself(bounds: Bounds) -> None:
    """Whatever its times spread, and wherever its losses lie."""
    ends = {"log_ratio": 0.5, "log_ratio_low": -2.0, "log_ratio_high": math.inf, "prompt_tokens": 128}
    early = {"tokens_used": 40, "tokens_available": 80, "decided": "below", "whole": False}
    rows = [
        row("perplexity", 20.0, nll="lost", detail={"window_counts": [40]}),
        row("perplexity.delta", 0.1, interval=(0.0, 0.2), detail=early),
        row("latency.decode", 0.1, samples=(0.1, 0.9), detail=ends),
        row("divergence.kl", 0.1),
        row("memory.run_peak", 1000.0),
    ]
    reread = [Row.from_json(one.to_json()) for one in rows]
    nothing: dict[str, NDArray[Any]] = {}
    found = compare(rows, reread, nothing.get, nothing.get, bounds=bounds)
    assert {entry.verdict for entry in found.entries} == {Verdict.SAME}
    assert found.status == 0


@pytest.mark.parametrize(
    ("metric", "now", "verdict"),
    [
        ("memory.storage", 1001, Verdict.WORSE),
        ("memory.storage", 1000, Verdict.SAME),
        ("memory.run_peak", 905, Verdict.WITHIN_NOISE),
        ("memory.run_peak", 895, Verdict.BETTER),
        ("memory.run_peak", 1105, Verdict.WORSE),
        ("divergence.kl", 1005, Verdict.WITHIN_NOISE),
        ("divergence.kl", 1015, Verdict.WORSE),
        ("divergence.same_top", 1001, Verdict.BETTER),
        ("divergence.kl", math.nan, Verdict.WORSE),
        ("perplexity", math.inf, Verdict.WORSE),
        ("perplexity", 1139, Verdict.WORSE),  # 13.9% more, and no losses to pair
    ],
)
def test_other_figures(bounds: Bounds, metric: str, now: float, verdict: Verdict) -> None:
    interval = (900.0, 1100.0)  # of text like this: on the same tokens a figure is exact
    assert both(row(metric, 1000.0, interval=interval), row(metric, float(now), interval=interval), bounds) is verdict


@pytest.mark.parametrize(
    ("change", "reach", "verdict"),
    [
        (0.2, 0.03, Verdict.WORSE),
        (-0.2, 0.03, Verdict.BETTER),
        (0.03, 0.03, Verdict.WITHIN_NOISE),
        (0.12, 0.03, Verdict.WITHIN_NOISE),
        (0.03, 0.2, Verdict.WITHIN_NOISE),
        (0.03, 0.4, Verdict.UNUSABLE),  # half as much again could hide in it
        (0.12, math.inf, Verdict.UNUSABLE),
    ],
)
def test_times(bounds: Bounds, change: float, reach: float, verdict: Verdict) -> None:
    def timed(ratio: float) -> Row:
        ends = {"log_ratio": ratio, "log_ratio_low": ratio - reach, "log_ratio_high": ratio + reach}
        return row("latency.decode", 0.1, detail={**ends, "aa_floor": 0.02, "prompt_tokens": 128})

    assert both(timed(0.5), timed(0.5 + change), bounds) is verdict


def test_a_figure_that_neither_side_can_have_decides_nothing(bounds: Bounds) -> None:
    gone = row("perplexity.word", None, verdict=Verdict.NOT_COMPARABLE, reason="left out: no words")
    plain, nothing = row("memory.storage", 1000.0), dict[str, NDArray[Any]]()
    found = compare([gone, plain], [gone, plain], nothing.get, nothing.get, bounds=bounds)
    assert [entry.verdict for entry in found.entries] == [None, Verdict.SAME]
    assert (found.status, found.entries[0].reason) == (0, "left out: no words")


@pytest.mark.parametrize("whose", ["A", "B"])
def test_a_time_taken_beside_other_work_says_whose(bounds: Bounds, whose: str) -> None:
    ends = {"log_ratio": 0.5, "log_ratio_low": 0.49, "log_ratio_high": 0.51, "aa_floor": 0.02}
    beside = {"crowded": True, "others": 0.8}
    quiet, crowded = (row("latency.decode", 0.1, detail={**ends, **more}) for more in ({}, beside))
    before, now = (crowded, quiet) if whose == "A" else (quiet, crowded)
    nothing: dict[str, NDArray[Any]] = {}
    (entry,) = compare([before], [now], nothing.get, nothing.get, bounds=bounds).entries
    assert entry.verdict is Verdict.UNUSABLE
    assert f"other work kept 0.8 cores busy while {whose} was timed" in entry.reason


@pytest.mark.parametrize(
    ("other", "verdict"),
    [
        ({"protocol_id": "text: olmo; tokens: all"}, Verdict.INPUT_CHANGED),
        ({"protocol_id": "text: lee; tokens: the first 99"}, Verdict.NOT_COMPARABLE),
        ({"token_hash": "e" * 64}, Verdict.INPUT_CHANGED),
        ({"count": 39}, Verdict.INPUT_CHANGED),
        ({"identity": "e" * 64}, Verdict.INPUT_CHANGED),
        ({"unit": "bit"}, Verdict.NOT_COMPARABLE),
    ],
)
def test_what_may_not_be_compared(bounds: Bounds, other: dict[str, Any], verdict: Verdict) -> None:
    facts = {"count": 40, "identity": "f" * 64, "revision": "r", "protocol_id": "text: lee; tokens: all"}
    before = row("perplexity", 20.0, **facts)
    assert both(before, row("perplexity", 20.0, **{**facts, **other}), bounds) is verdict


def test_two_reports_may_be_of_other_weights_which_are_named(bounds: Bounds) -> None:
    """Every token moved then: the mean alone says which way."""
    known = {name: {"config.hidden": "64", "weights": name} for name in ("old", "new")}
    swing = 0.08 * SWING
    losses = {name: values.astype(np.float32) for name, values in (("then", BASE), ("now", BASE + swing))}
    rows = [
        row("perplexity", 20.0, nll=nll, revision=name, identity=name, detail={"window_counts": [4] * 10})
        for name, nll in (("old", "then"), ("new", "now"))
    ]
    found = compare(rows[:1], rows[1:], losses.get, losses.get, bounds=bounds, identities=known.get)
    assert found.entries[0].verdict is Verdict.WITHIN_NOISE
    assert found.notes == ("weights of m differ: old -> new", "m: weights: old -> new")
