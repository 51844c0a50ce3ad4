"""Signals in a session that measures: SIGTERM and SIGHUP end it as Ctrl-C does, with a report.

Other people's handlers stay, and a signal that is ignored (nohup) stays ignored. While the end of a session writes,
signals wait: the report is a matter of seconds, and half of one is worth nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from types import FrameType
from typing import Any

import pytest
from pluggy import HookimplMarker

hookimpl = HookimplMarker("pytest")
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Ending:
    """Registered in the controller (or the only process) when its session is about to measure."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.ended = 0  # by this signal
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self.taken = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
        for number in self.taken:
            signal.signal(number, self.end)

    def end(self, number: int, frame: FrameType | None) -> None:
        """End the session as Ctrl-C does: pytest's own exit is an Exception, which other people's code catches."""
        self.ended = number
        raise KeyboardInterrupt(f"ended by {signal.Signals(number).name}")

    @hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        """Note what comes while everything is written; a second Ctrl-C is obeyed at once."""
        came: list[int] = []

        def note(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and number in came:
                raise KeyboardInterrupt
            came.append(number)

        held = [*self.taken, signal.SIGINT] if threading.current_thread() is threading.main_thread() else []
        before: dict[int, Any] = {number: signal.signal(number, note) for number in held}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.pytest_unconfigure()  # what comes from here on finds everything written
        if self.ended:
            session.exitstatus = 128 + self.ended  # as a shell says it
        elif came:
            interrupted = int(pytest.ExitCode.INTERRUPTED)
            session.exitstatus = interrupted if came[0] == signal.SIGINT else 128 + came[0]

    @hookimpl
    def pytest_unconfigure(self) -> None:
        """Give the signals back, those that are still ours."""
        for number in self.taken:
            if signal.getsignal(number) == self.end:
                signal.signal(number, signal.SIG_DFL)
