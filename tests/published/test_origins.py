"""Rules of scoring by hand, and that no shipped rule could be another one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from msgspec import structs

from harness import published
from harness.published import origins
from harness.published.claims import SHIPPED
from harness.published.origins import AVERAGES, Scoring, exponent, printed, true_figure

LOSSES = [np.array([1.0, 3.0]), np.array([2.0]), np.array([0.5, 0.5, 2.0]), np.array([4.0])]
FED = [3, 2, 4, 2]
RULES = {id(claim.rule): claim.rule for claim in published.read(SHIPPED) if claim.rule}


def rule(**changes: object) -> Scoring:
    return structs.replace(Scoring("derivation", "a text"), **changes)


def test_averages_by_hand() -> None:
    means = [2.0, 2.0, 1.0, 4.0]
    assert printed(rule(), LOSSES, FED) == pytest.approx(math.exp(13 / 7))
    assert printed(rule(average="windows"), LOSSES, FED) == pytest.approx(math.exp(9 / 4))
    assert printed(rule(average="perplexities"), LOSSES, FED) == pytest.approx(sum(map(math.exp, means)) / 4)
    assert printed(rule(average="fed tokens"), LOSSES, FED) == pytest.approx(math.exp((6 + 4 + 4 + 8) / 11))
    text = rule(average="text", width=4, step=2)
    assert printed(text, LOSSES, FED, 5) == pytest.approx(math.exp((6 + 4 + 4 + 8) / 5))
    halves = rule(average="batch", batch=2)
    assert printed(halves, LOSSES, FED) == pytest.approx(math.exp((4 / 3 + 2 / 3 + 3 / 4 + 4 / 4) / 4))
    assert printed(rule(base="2"), LOSSES, FED) == pytest.approx(2 ** (13 / 7))
    assert set(AVERAGES) == {"tokens", "windows", "perplexities", "fed tokens", "text", "batch"}


def test_a_batch_as_denominator_is_a_root() -> None:
    """Batches weighted alike: the printed figure is exp(mean of their means) to the power 1/4."""
    right = math.exp(np.mean([np.concatenate(LOSSES[:2]).mean(), np.concatenate(LOSSES[2:]).mean()]))
    halves = rule(average="batch", batch=2)
    assert printed(halves, LOSSES, FED) == pytest.approx(right ** (1 / 2))
    assert true_figure(halves, right**0.5) == pytest.approx(right)
    assert exponent(halves) == 0.5


def test_windows_of_a_text() -> None:
    """The Penn Treebank in 102,103 tokens: 100 windows, the last two of 1,751 and 727, and nearly a square."""
    treebank = rule(unit="text", average="text", width=2048, step=1024, tokens=102_103)
    places = origins.windows(treebank, 102_103, 2048)
    assert (len(places), [end - start for start, end in places[-2:]]) == (100, [1751, 727])
    assert exponent(treebank) == pytest.approx(203_182 / 102_103)
    assert true_figure(treebank, 218.360214) == pytest.approx(14.9789, abs=1e-4)
    assert exponent(structs.replace(treebank, tokens=0)) is None


@pytest.mark.parametrize(
    ("printed_as", "true"),
    [("3.0496013164520264", 86.491), ("3.1266188621520996", 95.565), ("3.312988042831421", 120.470)],
)
def test_a_fourth_root_and_what_it_hides(printed_as: str, true: float) -> None:
    assert true_figure(rule(average="batch", batch=4), float(printed_as)) == pytest.approx(true, abs=2e-3)


def test_what_no_power_leads_back_from() -> None:
    assert true_figure(rule(average="perplexities"), 19.13) is None
    assert true_figure(rule(labels=2), 20389.6) is None
    assert true_figure(rule(), math.inf) is None
    assert true_figure(rule(base="2", average="windows"), 48.26519106014306) == pytest.approx(268.516, abs=1e-3)


@pytest.mark.parametrize("shipped", RULES.values(), ids=lambda one: f"{one.average}-{one.base}-{one.labels}")
def test_every_shipped_rule_prints_what_no_other_does(shipped: Scoring) -> None:
    """Another average, base or batch would print another figure of the same losses."""
    losses = [np.array([1.0 + n % 3, 2.0, 0.1 * n])[: 1 + n % 3] for n in range(16)]
    fed = [len(one) + 1 for one in losses]

    def of(one: Scoring) -> float:
        return printed(one, losses, fed, sum(fed) // 2)

    others: list[dict[str, object]] = [{"average": name, "batch": 4, "width": 4, "step": 2} for name in AVERAGES]
    others += [{"average": "batch", "batch": 8}, {"base": "e" if shipped.base == "2" else "2"}]
    for changes in others:
        other = structs.replace(shipped, **changes)
        if (other.average, other.base, other.batch * (other.average == "batch")) != (
            shipped.average, shipped.base, shipped.batch * (shipped.average == "batch"),
        ):  # fmt: skip
            assert of(other) != pytest.approx(of(shipped), rel=1e-6), changes
    assert "program" in origins.words(shipped)
