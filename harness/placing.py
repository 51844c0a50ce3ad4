"""Where groups run: in child processes of this machine, or as tasks of Ray. No torch, and no Ray unless asked for."""

from __future__ import annotations

import os

from harness.errors import HarnessError
from harness.options import Options
from harness.runner import Runner


def threads() -> int:
    """One thread a core that this process may use: the same whatever -n says."""
    return len(os.sched_getaffinity(0))


def check(options: Options, workers: int) -> None:
    """HarnessError where the engine is not installed, or xdist's workers are asked for beside it."""
    if options.engine != "ray":
        return
    from harness.cluster import connection  # local: only where Ray is asked for

    if workers:
        raise HarnessError("-n starts workers of pytest-xdist and --engine ray has Ray's: leave one of them out")
    connection.require()


def runner_of(options: Options) -> type[Runner]:
    """What measures the cases of a session."""
    if options.engine != "ray":
        return Runner
    from harness.cluster.driver import RayRunner  # local: only where Ray is asked for

    return RayRunner


def cuda(options: Options, here: bool) -> bool:
    """Whether cases can run on a CUDA device: `here`, or on a node of the cluster that the options name."""
    if here or options.engine != "ray" or not options.ray_address:
        return here
    from harness.cluster import connection  # local: only where Ray is asked for

    return any(node.gpus for node in connection.living(connection.connect(options.ray_address, threads())))
