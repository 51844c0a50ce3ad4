"""The line that says what is being done: what it says, where it stands, and when there is none."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from harness.core.progress import Piece
from harness.plugin.progress_line import BACK, BELOW, ERASE, ROOM, ProgressLine

COSTS = {f"gpt2/nf4/lee/chunk:512/{name}/cpu": cost for name, cost in (("a", 10.0), ("b", 10.0), ("c", 40.0))}


class Screen:
    """A pretended terminal or log, and a clock that stands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, tty: bool, verbose: int = 0) -> None:
        self.now, self.written, self.lines = 0.0, list[str](), list[str]()
        self.captured, self.asked = True, 0
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "60")
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=self.write, flush=lambda: None))
        reporter = SimpleNamespace(isatty=tty, write_line=self.lines.append, line=self.lines.append)
        plugins = {"terminalreporter": reporter, "capturemanager": self}
        config: Any = SimpleNamespace(
            pluginmanager=SimpleNamespace(get_plugin=plugins.get),
            option=SimpleNamespace(verbose=verbose),
            get_terminal_writer=lambda: SimpleNamespace(width_of_current_line=3),
        )
        self.line = ProgressLine(config, self.predict, lambda: self.now)

    def predict(self) -> dict[str, float]:
        self.asked += 1
        return COSTS

    def write(self, text: str) -> None:
        assert not self.captured
        self.written.append(text)

    @contextlib.contextmanager
    def global_and_fixture_disabled(self) -> Iterator[None]:
        self.captured = False
        yield
        self.captured = True

    def case(self, name: str, seconds: float) -> None:
        """A case from its start to its end."""
        self.line.pytest_runtest_logstart(name)
        self.now += seconds
        self.line.pytest_runtest_logreport()
        assert list(self.line.pytest_runtest_logfinish(name)) == [None]


def node(name: str) -> str:
    return f"test_cases.py::test_measured[gpt2/nf4/lee/chunk:512/{name}/cpu]"


def test_in_a_terminal_a_line_moves_below_pytests_own(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, tty=True)
    screen.line.pytest_runtest_logstart(node("a"))
    for at in range(1, 5):
        screen.now += 1.0
        screen.line.watch(Piece("a window of text", at, 10))
    shown = f"{ROOM}{BELOW}{ERASE}nf4 a | window of text 4 of 10, 6 s left{BACK}"
    assert screen.written[-1] == shown
    screen.line.watch(Piece("a window of text", 5, 10))  # at the same moment
    assert screen.written[-1] == shown
    screen.line.pytest_runtest_logreport()  # who writes finds the line gone
    assert screen.written[-1] == f"{BELOW}{ERASE}{BACK}"
    count = len(screen.written)
    screen.line.pytest_keyboard_interrupt()
    assert len(screen.written) == count  # there was nothing to erase
    assert screen.lines == []


def test_what_is_left_of_the_session_follows_predicted_costs_at_the_pace_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = Screen(monkeypatch, tty=True)
    screen.case(node("a"), 20.0)
    assert "1 of 3 cases" in screen.written[-1]  # one is too few for a pace
    screen.case(node("b"), 20.0)
    assert "2 of 3 cases, 1 min left" in screen.written[-1]  # 40 units at two seconds each
    screen.case("test_other.py::test_of_theirs", 5.0)
    assert screen.asked == 1
    screen.line.pytest_runtest_logstart(node("c"))
    screen.now += 1
    screen.line.watch(Piece("fetching org/a-model", 2_000_000, 500_000_000, "B"))
    drawn = screen.written[-1].removeprefix(f"{ROOM}{BELOW}{ERASE}").removesuffix(BACK)
    assert drawn == "2 of 3 cases, 2 min left | nf4 c | fetching org/a-model 2 of 500 MB"[:59]  # of 60 columns


def test_in_a_log_there_is_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, tty=False)
    for minute in range(4):
        for second in range(60):
            screen.now = 60.0 * minute + second
            screen.line.watch(Piece("a tensor to read", 1 + int(screen.now), 600))
    assert screen.lines == [
        "harness: tensor to read 61 of 600, 9 min left",
        "harness: tensor to read 121 of 600, 8 min left",
        "harness: tensor to read 181 of 600, 7 min left",
    ]
    assert screen.written == []


@pytest.mark.parametrize("tty", [True, False])
def test_with_q_nothing_is_shown_or_predicted_and_what_is_said_stays(
    monkeypatch: pytest.MonkeyPatch, tty: bool
) -> None:
    screen = Screen(monkeypatch, tty=tty, verbose=-1)
    screen.case(node("a"), 100.0)
    screen.line.watch(Piece("a tensor to read", 1, 600))
    screen.line.say("fetching org/name")
    assert (screen.written, [line for line in screen.lines if line], screen.asked) == ([], ["fetching org/name"], 0)


def test_a_terminal_that_cannot_move_is_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, tty=True)
    assert screen.line.moving
    monkeypatch.setenv("TERM", "dumb")
    config: Any = SimpleNamespace(
        pluginmanager=SimpleNamespace(get_plugin={"terminalreporter": screen.line.reporter}.get),
        option=SimpleNamespace(verbose=0),
        get_terminal_writer=lambda: None,
    )
    assert not ProgressLine(config, screen.predict).moving


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, tty=True)

    def refuse(text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=refuse, flush=lambda: None))
    screen.now += 1
    screen.line.watch(Piece("a tensor to read", 1, 600))
    screen.now += 1
    screen.line.watch(Piece("a tensor to read", 2, 600))
    assert not screen.line.shown


def test_among_dots_a_line_begins_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, tty=False)
    screen.line.say("before")
    screen.line.pytest_runtest_logstart(node("a"))
    screen.line.say("waiting for a lock")
    assert screen.lines == ["before", "", "waiting for a lock"]
