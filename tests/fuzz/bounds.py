"""What every fuzzed call is held to."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import unicodedata
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings

from harness.core.errors import HarnessError
from harness.core.text import RISKY

T = TypeVar("T")
SCALE = int(os.environ.get("HARNESS_FUZZ", "1"))
SECONDS = 20  # of one call; each takes milliseconds
MEMORY = 600 * 2**20  # bytes by which this process may grow over its peak in one call
EXAMPLES = {"quick": 120, "slow": 25, "slowest": 5}  # a test, in the short profile
CHECKS = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large)
quick = settings(max_examples=EXAMPLES["quick"] * SCALE, suppress_health_check=CHECKS)
slowest = settings(max_examples=EXAMPLES["slowest"] * SCALE, suppress_health_check=CHECKS)
slow = settings(max_examples=EXAMPLES["slow"] * SCALE, suppress_health_check=CHECKS)


@contextlib.contextmanager
def in_time(seconds: int = SECONDS) -> Iterator[None]:
    """TimeoutError for a call that hangs in Python code."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak() -> int:
    """Bytes of this process's largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def survives(call: Callable[..., T], *arguments: Any, **named: Any) -> T | None:
    """The call's result, or None where it refused in one harmless line; any other exception is a crash."""
    before = peak()
    try:
        with in_time():
            return call(*arguments, **named)
    except HarnessError as error:
        harmless_line(str(error))
        return None
    finally:
        assert peak() - before < MEMORY


def harmless_line(text: str) -> None:
    """One line that a terminal only shows."""
    assert text.strip()
    assert "\n" not in text
    assert not any(unicodedata.category(char) in RISKY for char in text), repr(text)
