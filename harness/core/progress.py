"""What a process is doing, told to whoever waits for its answer: so that a hang is seen, and named.

A process that answers requests says where steps are told (`tell_to`); in any other one `note` does nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

EVERY_SECONDS = 5.0  # one step is told again no sooner: a window of text may take a millisecond
WAITING = "waiting for "  # how a step begins that waits for somebody else


class Steps:
    """Passes steps on, from whichever thread they are noted."""

    def __init__(self) -> None:
        self._tell: Callable[[str], None] | None = None
        self._last = ""
        self._told = 0.0
        self._one_at_a_time = threading.Lock()

    def tell_to(self, tell: Callable[[str], None]) -> None:
        """From now on `tell` gets the steps."""
        self._tell = tell

    def note(self, step: str) -> None:
        """A piece of this step begins: a tensor, a window, a repetition. Pieces of one step say the same words."""
        if self._tell is None:
            return
        with self._one_at_a_time:
            now = time.monotonic()
            if step != self._last or now - self._told >= EVERY_SECONDS:
                self._last, self._told = step, now
                self._tell(step)


_of_this_process = Steps()
note, tell_to = _of_this_process.note, _of_this_process.tell_to
