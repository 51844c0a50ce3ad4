"""How long a process that answers requests lives: never longer than who asks. No torch."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
import time
from multiprocessing import forkserver
from multiprocessing.connection import Connection


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
