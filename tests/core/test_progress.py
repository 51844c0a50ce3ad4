from __future__ import annotations

import time

import pytest

from harness.core.progress import EVERY_SECONDS, EVERY_TIMED_SECONDS, REST_SECONDS, Piece, Steps


def listened() -> tuple[Steps, list[Piece]]:
    told: list[Piece] = []
    steps = Steps()
    steps.note("a window")  # nobody listens
    steps.tell_to(told.append)
    return steps, told


def test_a_step_is_told_when_it_begins_and_again_after_a_while() -> None:
    steps, told = listened()
    for what in ("a tensor", "a tensor", "a window", "a tensor"):
        steps.note(what)
    assert [piece.what for piece in told] == ["a tensor", "a window", "a tensor"]
    steps._told -= EVERY_SECONDS
    steps.note("a tensor", 3, 4)
    assert told[-1] == Piece("a tensor", 3, 4)


def test_each_counts_what_can_be_counted() -> None:
    steps, told = listened()
    steps._told -= EVERY_SECONDS
    assert list(steps.each("a tensor", {"a": 1, "b": 2}.items())) == [("a", 1), ("b", 2)]
    assert told == [Piece("a tensor", 1, 2)]
    assert list(steps.each("a line", iter("ab"))) == ["a", "b"]
    assert told[-1] == Piece("a line", 1, 2)  # an iterator that knows its length
    assert list(steps.each("a word", (letter for letter in "ab"))) == ["a", "b"]
    assert told[-1] == Piece("a word", 1, 0)


def test_within_a_timed_region_little_is_told_and_nothing_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    rested: list[float] = []
    monkeypatch.setattr(time, "sleep", rested.append)
    steps, told = listened()
    with steps.timing():
        steps.between("a timed repetition", 1, 20)
        steps.note("a window", 1, 8)  # of a timed pass over a text
        steps.between("a timed repetition", 2, 20)
        assert told == [Piece("a timed repetition", 1, 20)]
        assert rested == [REST_SECONDS]
        steps._told -= EVERY_SECONDS
        steps.note("a window", 2, 8)
        assert len(told) == 1
        steps._told -= EVERY_TIMED_SECONDS
        steps.note("a window", 3, 8)  # so that a hang is seen
        assert told[-1] == Piece("a window", 3, 8, shown=False)
        assert rested == [REST_SECONDS]
    steps.note("a tensor")
    assert told[-1].shown
    steps._told -= EVERY_SECONDS
    steps.alive("fetching it")
    assert told[-1] == Piece("fetching it", shown=False)
