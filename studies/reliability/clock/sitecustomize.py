"""A wall clock that jumps: `time.time` is off by the seconds that the file $FAULTS_CLOCK holds at that moment."""

import os
import time
from pathlib import Path

if os.environ.get("FAULTS_CLOCK"):
    WRONG_BY = Path(os.environ["FAULTS_CLOCK"])
    REAL, REAL_NS = time.time, time.time_ns

    def offset() -> float:
        """Seconds by which the clock is wrong now."""
        try:
            return float(WRONG_BY.read_text())
        except (OSError, ValueError):  # not there yet, or just being written
            return 0.0

    time.time = lambda: REAL() + offset()
    time.time_ns = lambda: REAL_NS() + int(offset() * 1e9)
