"""The way to Ray, and what a task asks of it.

Ray is imported when it is asked for, started here or joined; every failure is one line. A task asks for processors,
memory and a share of a card, from its group's predicted bytes: pure arithmetic over the nodes that there are. No more
is asked than some node has: a group that is predicted to fit nowhere gets the roomiest node and fails there as it
would on a machine of that size.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.core.errors import HarnessError, MissingPackage

PROCESS_BYTES = 1 << 30  # of a group's process beside its models: torch by itself 0.5 GB, and a window's activations
SHARE_STEPS = 100  # a card is shared in hundredths
REACH_SECONDS = 10  # for a cluster's port to open
STATUS_SECONDS = 30  # for a cluster to say how it is: Ray itself waits for minutes
STORE_BYTES = 1 << 28  # of the object store of a Ray of our own: losses pass through it, weights do not
# Set before Ray is imported, where the user has not: it reads them once.
VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_task_oom_retries": "2",  # by itself it repeats a task that its memory monitor killed for ever
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # its next default, which it warns of otherwise
}


@dataclass(frozen=True)
class Node:
    """A living node of the cluster: all that it has, taken or not; memory in bytes."""

    cpus: float
    memory: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Request:
    """What one task asks for; memory in bytes."""

    cpus: float
    memory: int
    gpus: float = 0.0

    def options(self) -> dict[str, Any]:
        """As Ray's task options."""
        return {"num_cpus": self.cpus, "memory": self.memory, "num_gpus": self.gpus}

    def fits(self, nodes: Sequence[Node]) -> bool:
        """Whether some node could ever hold it."""
        return any(node.cpus >= self.cpus and node.memory >= self.memory and node.gpus >= self.gpus for node in nodes)

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPUs", f"{self.memory / 2**30:.1f} GiB of memory"]
        return ", ".join(parts + ([f"{self.gpus:g} GPUs"] if self.gpus else []))


def request(device: str, predicted: int, *, timed: bool, threads: int, nodes: Sequence[Node], card: int) -> Request:
    """The request of a group.

    Args:
        device: 'cpu' or 'cuda'.
        predicted: bytes of the group's models at their peak, 0 where nothing is known.
        timed: whether any of its cases is timed: then it has a device to itself, the whole node or a whole card.
        threads: of the compute pool, alike on every node.
        nodes: the living nodes.
        card: bytes of the smallest card, 0 where it is not known.
    """
    needed = predicted + PROCESS_BYTES
    if device == "cuda":
        share = 1.0
        if card and predicted and not timed:
            share = min(1.0, math.ceil(needed / card * SHARE_STEPS) / SHARE_STEPS)
        host = max((node for node in nodes if node.gpus), key=lambda node: node.memory, default=None)
        return Request(1, min(needed, int(host.memory)) if host else needed, share)
    roomy = [node for node in nodes if node.memory >= needed and node.cpus >= threads]
    if roomy and timed:
        return Request(max(node.cpus for node in roomy), needed)
    if roomy or not nodes:
        return Request(threads, needed)
    best = max(nodes, key=lambda node: (node.memory, node.cpus))
    cpus = best.cpus if timed else min(float(threads), best.cpus)
    return Request(cpus, min(needed, int(best.memory)))


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
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(has.get("CPU", 0.0), has.get("memory", 0.0), has.get("GPU", 0.0)) for has in alive]
