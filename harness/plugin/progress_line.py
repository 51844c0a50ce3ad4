"""What a session is doing and how long it will take: one moving line in a terminal, a line a minute in a log.

The moving line stands below pytest's own, which is left where it is: the terminal makes room (IND and RI move the
cursor a line down and up, and scroll where there is none), and whoever writes next finds the line erased. Nothing
moves by itself: the line is drawn when a piece of work is told, and the measuring process tells none while it times.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import pytest
from pluggy import HookimplMarker

from harness.core.progress import Piece
from harness.core.text import visible
from harness.plugin.xdist import CASE_FIELDS, case_id
from harness.run.forecast import duration

hookimpl = HookimplMarker("pytest")
ROOM, BELOW, BACK = "\x1bD\x1bM", "\x1b7\x1b[B\r", "\x1b8"  # for a line; to it, and back to where the cursor was
ERASE = "\x1b[J"  # from the cursor to the end of the screen
CLEAR = "\r\x1b[K"  # the line that the cursor is on
MINUTE = 60.0  # between two lines of a log
SOON = 0.2  # between two moving lines
SURE = 2  # pieces, or cases, behind which a pace is worth saying


class ProgressLine:
    """Registered in the controller (or the only process) of a session that measures.

    Args:
        config: pytest's.
        predict: gives the predicted seconds of each case by its id; asked only where they are shown.
        clock: gives seconds.
    """

    def __init__(
        self,
        config: pytest.Config,
        predict: Callable[[], Mapping[str, float]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        self.capture: Any = config.pluginmanager.get_plugin("capturemanager")
        self.writer = config.get_terminal_writer() if self.reporter is not None else None
        self.shown = self.reporter is not None and config.option.verbose >= 0
        able = bool(getattr(self.reporter, "isatty", False)) and os.environ.get("TERM", "dumb") != "dumb"
        self.moving = self.shown and able
        self.seconds = predict() if self.shown else {}
        self.several = len({name.partition("/")[0] for name in self.seconds}) > 1  # models
        self.last = clock()  # when a line was shown
        self.drawn = False
        self.case, self.done = "", set[str]()
        self.begun: float | None = None  # when the first case began
        self.piece, self.first = Piece(""), (0, 0.0)  # of the pieces of one step, the first seen, and when

    # what is told

    def say(self, line: str) -> None:
        """A line that stays."""
        self._erase()
        with self._uncaptured():
            if self.reporter is None:
                print(line)
            elif self.begun is None:
                if self.moving:
                    self._write(CLEAR)  # what pytest-xdist says of its workers, and says again
                self.reporter.write_line(line)
            elif self.writer is not None:  # below the dots of the cases so far, which pytest may not know for its own
                if self.writer.width_of_current_line:
                    self.reporter.line("")
                self.reporter.currentfspath = None
                self.reporter.line(line)

    def watch(self, piece: Piece) -> None:
        """A piece of work begins."""
        now = self.clock()
        if (piece.what, piece.of) != (self.piece.what, self.piece.of) or piece.at < self.piece.at:
            self.first = piece.at, now
        self.piece = piece
        self._show(now)

    @hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A case begins, or another test."""
        self._erase()
        name = case_id(nodeid)
        self.case, self.piece = name if name.count("/") + 1 in CASE_FIELDS else "", Piece("")
        self.begun = self.clock() if self.begun is None else self.begun

    @hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self) -> None:
        """What others write now."""
        self._erase()

    @hookimpl(wrapper=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> Generator[None, None, None]:
        """A case has ended."""
        self._erase()
        yield
        if (name := case_id(nodeid)) in self.seconds:
            self.done.add(name)
            self.case, self.piece = "", Piece("")
            self._show(self.clock())

    @hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self) -> None:
        """Ctrl-C."""
        self._erase()

    @hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """The end."""
        self._erase()

    # in which words

    def line(self, now: float) -> str:
        """How far the session is, which case is measured, and how far that is."""
        return " | ".join(filter(None, (self._session(now), self._case(), self._step(now))))

    def _session(self, now: float) -> str:
        """'12 of 157 cases, 11 min left': by what the rest is predicted to cost, at the pace so far."""
        if not self.done or self.begun is None:
            return ""
        told = f"{len(self.done)} of {len(self.seconds)} cases"
        paid = sum(self.seconds[name] for name in self.done)
        rest = sum(self.seconds.values()) - paid
        if len(self.done) < SURE or paid <= 0 or rest <= 0:
            return told
        return f"{told}, {duration((now - self.begun) * rest / paid)} left"

    def _case(self) -> str:
        """'nf4 perplexity', behind its model where there are several."""
        fields = self.case.split("/")
        return " ".join((*fields[: self.several], fields[1], fields[-2])) if self.case else ""

    def _step(self, now: float) -> str:
        """'window of text 312 of 980, 41 s left'."""
        what, at, of, unit, _ = self.piece
        what = what.removeprefix("a ")
        if of < SURE:
            return what
        scale, sign = (1e6, " MB") if unit == "B" else (1.0, "")
        told = f"{what} {at / scale:,.0f} of {of / scale:,.0f}{sign}"
        first, since = self.first
        if at - first < SURE or at >= of:
            return told
        return f"{told}, {duration((now - since) * (of - at) / (at - first))} left"

    # where

    def _show(self, now: float) -> None:
        if not self.shown or now - self.last < (SOON if self.moving else MINUTE):
            return
        self.last = now
        if self.moving:
            width = shutil.get_terminal_size().columns - 1
            self._write(f"{ROOM}{BELOW}{ERASE}{visible(self.line(now))[:width]}{BACK}")
            self.drawn = True
        else:
            self.say(f"harness: {visible(self.line(now))}")

    def _erase(self) -> None:
        if self.drawn:
            self._write(f"{BELOW}{ERASE}{BACK}")
            self.drawn = False

    def _write(self, text: str) -> None:
        with self._uncaptured():
            try:
                sys.stdout.write(text)
                sys.stdout.flush()
            except OSError:  # the terminal is gone, which must not read as the end of a measuring process
                self.shown = False

    @contextlib.contextmanager
    def _uncaptured(self) -> Iterator[None]:
        """What is written within stands where pytest writes."""
        with self.capture.global_and_fixture_disabled() if self.capture else contextlib.nullcontext():
            yield
