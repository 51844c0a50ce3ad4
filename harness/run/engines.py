"""Where groups run: in child processes of this machine, or as tasks of Ray. No torch, and no Ray unless asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence

from harness.core import gpus
from harness.core.errors import HarnessError
from harness.core.options import Options
from harness.core.records import Case
from harness.run.local import Runner


def threads() -> int:
    """One thread a core that this process may use: the same whatever -n says."""
    return len(os.sched_getaffinity(0))


def check(options: Options, workers: int) -> None:
    """HarnessError where the engine is not installed, or xdist's workers are asked for beside it."""
    if options.engine != "ray":
        return
    from harness.run.ray import cluster  # local: only where Ray is asked for

    if workers:
        raise HarnessError("-n starts workers of pytest-xdist and --engine ray has Ray's: leave one of them out")
    cluster.require()


def runner_of(options: Options) -> type[Runner]:
    """What measures the cases of a session."""
    if options.engine != "ray":
        return Runner
    from harness.run.ray.ray_runner import RayRunner  # local: only where Ray is asked for

    return RayRunner


def cuda(options: Options) -> bool:
    """Whether cases can run on a CUDA device: here, or on a node of the cluster that the options name.

    Nobody is asked where the options want none.
    """
    if options.device == "cpu":
        return False
    here = bool(gpus.cuda_devices())
    if here or options.engine != "ray" or not options.ray_address:
        return here
    from harness.run.ray import cluster  # local: only where Ray is asked for

    return any(node.gpus for node in cluster.living(cluster.connect(options.ray_address, threads())))


def check_cards(cases: Sequence[Case], options: Options, usable: bool, workers: int) -> None:
    """HarnessError where the selected cases ask for more cards than there are; without a case on one nothing is asked.

    Args:
        cases: those selected. Where all need a card and none can be had, each of them would only be missing.
        options: of the session; with `allow_missing` that is wanted.
        usable: whether a card can be had, as `cuda` says.
        workers: of pytest-xdist, each of which takes a card; 0 where this process measures.
    """
    needy = [case for case in cases if case.device == "cuda"]
    if needy and len(needy) == len(cases) and not usable and not options.allow_missing:
        elsewhere = f", and no node of the Ray cluster at {options.ray_address} has one" if options.ray_address else ""
        fix = f"use --device cpu, or --allow-missing to report the {len(needy)} cases as missing"
        raise HarnessError(f"no CUDA device: {gpus.trouble()}{elsewhere}; {fix}")
    if needy and workers and (cards := gpus.cuda_devices()):
        gpus.refuse_crowd(workers, cards)


def pin(place: int) -> None:
    """Leave this process and what it starts one card: that at a place of the caller's CUDA_VISIBLE_DEVICES."""
    if place < len(gpus.cuda_devices()):  # beyond it the controller refuses the session
        os.environ[gpus.VISIBLE] = gpus.entry(place, os.environ.get(gpus.VISIBLE))
