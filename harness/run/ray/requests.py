"""What a task asks of Ray: processors, memory and a share of a card, from its group's predicted bytes.

Pure arithmetic over the nodes that there are. No more is asked than some node has: a group that is predicted to fit
nowhere gets the roomiest node and fails there as it would on a machine of that size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PROCESS_BYTES = 1 << 30  # of a group's process beside its models: torch by itself 0.5 GB, and a window's activations
SHARE_STEPS = 100  # a card is shared in hundredths


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
        share = 1.0 if timed or not (card and predicted) else min(1.0, _hundredths(needed / card))
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


def _hundredths(share: float) -> float:
    return math.ceil(share * SHARE_STEPS) / SHARE_STEPS
