"""What a process is doing, told to whoever waits for its answer: so that a hang is seen and named, and work followed.

A process that answers requests says where steps are told (`tell_to`); in any other one `note` does nothing.
"""

from __future__ import annotations

import contextlib
import operator
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

EVERY_SECONDS = 1.0  # one step is told again no sooner: a window of text may take a millisecond
EVERY_TIMED_SECONDS = 5.0  # the same among repetitions that are timed
REST_SECONDS = 0.005  # before a clock starts: whoever was told has shown it by then, some 0.3 ms of a core
WAITING = "waiting for "  # how a step begins that waits for somebody else

T = TypeVar("T")


class Piece(NamedTuple):
    """A piece of work: the `at`-th of `of` pieces of it begins; 0 of 0 where nobody counts."""

    what: str  # 'a window of text': pieces of one step say the same words
    at: int = 0
    of: int = 0
    unit: str = ""  # 'B' where pieces are bytes
    shown: bool = True  # False: told so that a hang is seen, and drawn nowhere


class Steps:
    """Passes steps on, from whichever thread they are noted."""

    def __init__(self) -> None:
        self._tell: Callable[[Piece], None] | None = None
        self._last = ""
        self._told = 0.0
        self._timed = False
        self._one_at_a_time = threading.Lock()

    def tell_to(self, tell: Callable[[Piece], None]) -> None:
        """From now on `tell` gets them."""
        self._tell = tell

    def note(self, what: str, at: int = 0, of: int = 0, unit: str = "") -> None:
        """A piece of a step begins: a tensor, a window."""
        every = EVERY_TIMED_SECONDS if self._timed else EVERY_SECONDS
        self._note(Piece(what, at, of, unit, shown=not self._timed), every, anew=not self._timed)

    def each(self, what: str, items: Iterable[T]) -> Iterator[T]:
        """The items, each noted as its turn comes."""
        count = operator.length_hint(items)
        for at, item in enumerate(items, 1):
            self.note(what, at, count)
            yield item

    def alive(self, what: str) -> None:
        """A sign of life of a step that counts nothing, or counts by itself: told so that it reads as no hang."""
        self._note(Piece(what, shown=False), EVERY_SECONDS, anew=False)

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """While this lasts a clock may run: what is noted is seldom told and never shown, except `between` two runs."""
        self._timed = True
        try:
            yield
        finally:
            self._timed = False

    def between(self, what: str, at: int = 0, of: int = 0) -> None:
        """A timed piece is about to begin, no clock runs yet: when this returns, whoever was told has shown it."""
        if self._note(Piece(what, at, of), EVERY_TIMED_SECONDS, anew=True):
            time.sleep(REST_SECONDS)

    def _note(self, piece: Piece, every: float, *, anew: bool) -> bool:
        """Whether it was told: at once where other words are (`anew`), else when the last is `every` seconds old."""
        if self._tell is None:
            return False
        with self._one_at_a_time:
            now = time.monotonic()
            if not (anew and piece.what != self._last) and now - self._told < every:
                return False
            self._last, self._told = piece.what, now
            self._tell(piece)
            return True


_of_this_process = Steps()
note, each, alive = _of_this_process.note, _of_this_process.each, _of_this_process.alive
timing, between, tell_to = _of_this_process.timing, _of_this_process.between, _of_this_process.tell_to
