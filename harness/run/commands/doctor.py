"""`doctor`: the environment, devices, assets and cache as the harness sees them, without torch."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from harness.core import gpus as probe
from harness.core.environment import capture
from harness.core.errors import HarnessError
from harness.core.files import cache_dir
from harness.core.options import read_declared
from harness.core.specification import parse
from harness.inputs.models import names as models
from harness.inputs.texts import corpora
from harness.judge import known_faults

MODELS = ("smollm2-135m", "tiny-gpt2", "tiny-olmo")
DATASETS = ("lee", "synthetic")


def add(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("doctor", help="environment, devices, assets, cache, recorded baselines")
    parser.add_argument("--recorded", metavar="MODEL", help="exit 0 if MODEL is recorded for this device class")
    parser.add_argument("--baselines", type=Path, default=Path("baselines"), metavar="DIR", help="default: baselines")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; with --recorded answer by the exit status alone."""
    gpus, trouble = probe.now().gpus, probe.trouble()
    world = capture("cuda" if gpus else "cpu", len(os.sched_getaffinity(0)))
    if arguments.recorded:
        suffix = "@" + world.device_class.replace(":", "+")
        folder = arguments.baselines / parse(arguments.recorded).filename
        found = [path for path in folder.glob("*@*.yaml") if path.stem.endswith(suffix)]
        print(f"{len(found)} methods of {arguments.recorded} are recorded for {world.device_class}")
        return 0 if found else 1
    for name, value in world.to_dict().items():
        print(f"{name}: {value}")
    print(f"device class: {world.device_class}")
    print(f"gpus: {len(gpus) or trouble}")
    for gpu in gpus:
        print(f"  {gpu.index}: {gpu.name} ({gpu.sm}), {gpu.memory / 2**30:.0f} GiB, {gpu.uuid}")
    if any(gpu.partition for gpu in gpus):
        print(f"  {probe.ONE_PARTITION}")
    print(f"cache: {cache_dir()}")
    _, declared = read_declared(Path.cwd())
    for kind, names, check in (("model", MODELS, models.check), ("dataset", DATASETS, corpora.check)):
        for name in names:
            try:
                check(parse(name), declared)
                print(f"{kind} {name}: at hand")
            except HarnessError as error:
                print(f"{kind} {name}: {error}")
    found = known_faults.applying(arguments.baselines, world)
    print(f"known faults that apply here: {len(found)}")
    for fault in found:
        print(f"  {fault.id}: {fault.summary} ({fault.package} {getattr(world, fault.package)}; {fault.reference})")
    return 0
