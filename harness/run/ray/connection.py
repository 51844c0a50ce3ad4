"""The way to Ray: imported when it is asked for, started here or joined; every failure is one line."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from harness.core.errors import HarnessError, MissingPackage
from harness.run.ray.requests import Node

REACH_SECONDS = 10  # for a cluster's port to open
STATUS_SECONDS = 30  # for a cluster to say how it is: Ray itself waits for minutes
STORE_BYTES = 1 << 28  # of the object store of a Ray of our own: losses pass through it, weights do not
# Set before Ray is imported, where the user has not: it reads them once.
VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_task_oom_retries": "2",  # by itself it repeats a task that its memory monitor killed for ever
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # its next default, which it warns of otherwise
}


def require() -> None:
    """MissingPackage where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise MissingPackage("ray", "--engine ray")


def connect(address: str | None, threads: int) -> Any:
    """The module `ray`, connected: to the cluster at `address`, or to one of this machine's own with `threads` CPUs.

    Raises:
        HarnessError: no such cluster, or not from here.
    """
    require()
    os.environ.update({name: value for name, value in VARIABLES.items() if name not in os.environ})
    if address:
        reach(address)
    with quiet():
        ray: Any = importlib.import_module("ray")
        if ray.is_initialized():
            return ray
        own: dict[str, Any] = {"num_cpus": threads, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level="ERROR",
                **({} if address else own),
            )
        except Exception as error:  # whatever Ray raises: RuntimeError, ConnectionError, ValueError, its own
            first = (str(error).strip().splitlines() or [repr(error)])[0]
            where = f"the Ray cluster at {address}" if address else "a Ray of this machine's own"
            fix = "; the command runs on a node of the cluster, with the cluster's version of Ray" if address else ""
            raise HarnessError(f"{where} cannot be used ({first[:200]}){fix}") from error
    return ray


def reach(address: str) -> None:
    """HarnessError unless something answers at 'HOST:PORT'; 'auto' is for Ray to find."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
        command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
        answered = subprocess.run(command, capture_output=True, timeout=STATUS_SECONDS, check=False).returncode == 0
        trouble = "" if answered else "what is there is no Ray"
    except (OSError, subprocess.TimeoutExpired) as error:
        trouble = "no answer" if isinstance(error, subprocess.TimeoutExpired) else error.strerror or str(error)
    if trouble:
        raise HarnessError(f"no Ray cluster answers at {address} ({trouble}): start one with `ray start --head`")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what Ray warns of in its own code out of a session that turns warnings into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def living(ray: Any) -> list[Node]:
    """The cluster's living nodes, with all that each has."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(one.get("CPU", 0.0), one.get("memory", 0.0), one.get("GPU", 0.0)) for one in found]
