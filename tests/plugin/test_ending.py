"""Signals that end a measuring session, each sent to this process at a known moment."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from harness.plugin.ending import ENDING, Ending


@pytest.fixture
def unhandled() -> Iterator[None]:
    """As in a plain pytest, whatever else this one runs under."""
    before: dict[int, Any] = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind a shell's &
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("unhandled")
@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_the_session_as_an_interruption_with_the_shells_status(number: int) -> None:
    ending = Ending()
    with pytest.raises(KeyboardInterrupt, match="ended by SIG"):
        signal.raise_signal(number)
    session: Any = SimpleNamespace(exitstatus=2)
    assert list(ending.pytest_sessionfinish(session)) == [None]
    assert session.exitstatus == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.usefixtures("unhandled")
def test_other_peoples_handlers_and_ignored_signals_stay() -> None:
    theirs: Any = lambda number, frame: None  # noqa: E731
    signal.signal(signal.SIGTERM, theirs)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ending = Ending()
    assert ending.taken == []
    ending.pytest_unconfigure()
    assert signal.getsignal(signal.SIGTERM) is theirs
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.usefixtures("unhandled")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 2)])
def test_what_comes_while_the_report_is_written_waits(number: int, status: int) -> None:
    session: Any = SimpleNamespace(exitstatus=0)
    writing = Ending().pytest_sessionfinish(session)
    next(writing)
    signal.raise_signal(number)
    assert list(writing) == []
    assert session.exitstatus == status
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.usefixtures("unhandled")
def test_a_second_interruption_is_obeyed() -> None:
    session: Any = SimpleNamespace(exitstatus=0)
    writing = Ending().pytest_sessionfinish(session)
    next(writing)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    writing.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
