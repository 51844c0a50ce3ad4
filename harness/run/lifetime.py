"""How long a process that answers requests lives: never longer than who asks, nor without a step. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

from harness.core import progress

LOOK_SECONDS = 5.0  # between two looks at what a process did
STEP_BYTES = 1 << 16  # written: more than what it says of itself
STEP_SECONDS = 2.0  # computed: more than threads that wait take in half an hour


def end_with_controller(connection: Connection, grace: float = 0.0) -> None:
    """End this process when its controller is gone, in the middle of whatever it does: the pipe hangs up then.

    A fork server ends with the controller too, once no child holds a copy of the pipe by which it sees that; on Linux a
    child that does not get to look (stopped, or inside a library that lets no thread run) is killed with it.
    `grace` are seconds for one that waits for a request to see the end by itself, and to tidy up.
    """
    system = ctypes.CDLL(None)
    if hasattr(system, "prctl"):
        system.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    alive = vars(forkserver._forkserver).pop("_forkserver_alive_fd", None)
    if alive is not None:
        os.close(alive)
    hung_up = select.poll()
    hung_up.register(connection, 0)  # of hang-ups alone: requests are read elsewhere

    def watch() -> None:
        hung_up.poll()
        time.sleep(grace)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="harness-controller-watch").start()


@contextlib.contextmanager
def work_told(what: Callable[[], str], every: float = LOOK_SECONDS) -> Iterator[None]:
    """Meanwhile what this process writes and computes is told as steps (`progress`) of `what`.

    For a download or a conversion inside a library that tells nothing: one that only waits takes no step, and is seen
    to hang.
    """
    over = threading.Event()

    def watch() -> None:
        written, computed = _written(), time.process_time()
        while not over.wait(every):
            if _written() - written >= STEP_BYTES or time.process_time() - computed >= STEP_SECONDS:
                progress.alive(what())
                written, computed = _written(), time.process_time()

    thread = threading.Thread(target=watch, daemon=True, name="harness-work-watch")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _written() -> int:
    """Bytes that this process has written so far; 0 where the system does not count them."""
    counters = Path("/proc/self/io")
    lines = counters.read_text("utf-8").splitlines() if os.access(counters, os.R_OK) else []
    return next((int(line.split()[1]) for line in lines if line.startswith("wchar:")), 0)
