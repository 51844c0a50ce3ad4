"""Timing in turn, driven through fakes: who is asked when, and what becomes of a side that fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest

from harness.core.errors import HarnessError
from harness.core.records import Case, Figure, Row, Verdict
from harness.judge.two_reports import Entry, compare
from harness.metrics.measuring.timing import FEWEST_BLOCKS, Load
from harness.run.messages import Repetition
from harness.run.upgrade.interleaved import interleave

CASE = Case("m", "bnb-nf4", "", "", "latency.decode", "cpu")


class Sides:
    """Fake live sides that take so many seconds, and note who was asked with how many untimed repetitions."""

    def __init__(self, **seconds: float | Callable[[int], float]) -> None:
        self.seconds, self.asked = seconds, list[tuple[str, int]]()

    def asks(self) -> dict[str, Callable[[Repetition], Any]]:
        return {name: self._ask(name) for name in self.seconds}

    def _ask(self, name: str) -> Callable[[Repetition], Any]:
        def ask(asked: Repetition) -> dict[str, Any]:
            self.asked.append((name, asked.lead))
            count = sum(who == name for who, _ in self.asked)
            taken = self.seconds[name]
            return {"seconds": taken(count) if callable(taken) else taken, "prompt_tokens": 128, "new_tokens": 1}

        return ask


def figures(sides: Sides, blocks: int = 8) -> dict[str, Figure]:
    found = interleave(sides.asks(), CASE, blocks)
    return {name: figure for name, figure in found.items() if isinstance(figure, Figure)}


def test_sides_alternate_and_short_work_is_led_in() -> None:
    sides = Sides(a=0.01, b=0.02, c=0.03)
    found = figures(sides, blocks=4)
    order = "".join(name for name, lead in sides.asked[-12:])
    assert order == "abccbaabccba"
    assert {lead for _, lead in sides.asked[-12:]} == {1}
    assert [len(figure.samples) for figure in found.values()] == [4, 4, 4]
    assert len({figure.detail["turns"] for figure in found.values()}) == 1


@pytest.mark.parametrize(("others", "crowded"), [(0.05, False), (0.9, True)])
def test_a_side_that_ran_beside_other_work_says_so(others: float, crowded: bool) -> None:
    def ask(asked: Repetition) -> dict[str, Any]:
        return {"seconds": 1.0, "threads": 2, "load": Load(2, others, 0.0, 0.02)}

    detail = cast(Figure, interleave({"a": ask}, CASE, 6)["a"]).detail
    assert (detail["others"], detail["crowded"]) == (pytest.approx(others), crowded)
    assert "load" not in detail


def test_slow_sides_get_fewer_blocks_and_no_lead() -> None:
    sides = Sides(a=0.01, b=5.0)
    found = figures(sides, blocks=20)
    assert [len(figure.samples) for figure in found.values()] == [FEWEST_BLOCKS, FEWEST_BLOCKS]
    assert (found["a"].detail["lead"], found["b"].detail["lead"]) == (1, 0)
    assert sum(name == "b" for name, _ in sides.asked) == FEWEST_BLOCKS + 1


def test_a_side_that_fails_does_not_hold_up_the_others() -> None:
    def fail(count: int) -> float:
        raise HarnessError("no such kernel")

    found = interleave(Sides(a=0.01, b=fail).asks(), CASE, 6)
    assert found["b"] == "no such kernel"
    assert isinstance(found["a"], Figure)
    assert len(found["a"].samples) == 6


def entry(a: Figure, b: Figure) -> Entry:
    rows = [
        Row.of(CASE, value=figure.value, unit="s", samples=figure.samples, detail=figure.detail) for figure in (a, b)
    ]
    return compared(*rows)


def compared(a: Row, b: Row) -> Entry:
    (found,) = compare([a], [b], lambda sha: None, lambda sha: None).entries
    return found


def test_turns_are_paired_block_by_block_in_a_comparison() -> None:
    found = figures(Sides(a=lambda n: 0.010 * 1.03**n, b=lambda n: 0.013 * 1.03**n))  # a clock that slows for both
    judged = entry(found["a"], found["b"])
    assert judged.change == pytest.approx(math.log(1.3), abs=1e-3)
    assert judged.verdict is Verdict.WORSE
    wild = [1.0, 1.5, 2.0, 1.2, 1.8, 1.1, 1.6, 1.4]
    noisy = figures(Sides(a=lambda n: 0.010 * wild[n % 8], b=lambda n: 0.013 * wild[n % 8]))
    assert entry(noisy["a"], noisy["b"]).verdict is Verdict.WITHIN_NOISE  # each differs from itself by more
    steady = figures(Sides(a=0.010, b=0.013))
    assert entry(steady["a"], steady["b"]).verdict is Verdict.WORSE
    assert entry(steady["b"], steady["a"]).verdict is Verdict.BETTER
    close = figures(Sides(a=0.010, b=0.0105))
    assert entry(close["a"], close["b"]).verdict is Verdict.WITHIN_NOISE


def test_the_references_own_time_is_judged_when_taken_in_turn() -> None:
    found = figures(Sides(a=0.010, b=0.020))
    case = Case("m", "fp32", "", "", "latency.decode", "cpu")
    rows = [Row.of(case, value=f.value, unit="s", samples=f.samples, detail=f.detail) for f in found.values()]
    assert compared(*rows).verdict is Verdict.WORSE
    alone = [Row.of(case, value=1.0, unit="s"), Row.of(case, value=2.0, unit="s")]
    assert compared(*alone).verdict is None
