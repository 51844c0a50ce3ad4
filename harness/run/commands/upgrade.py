"""`upgrade SIDE SIDE...`: what moves between versions of one package, measured here on both in turn."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from harness.core.options import SETTINGS, build, read_declared

TAKEN = "models methods metrics datasets protocols reference device max_tokens repetitions report_dir baselines".split()
DEFAULTS = {  # where they are not a session's
    "metrics": "invariant,perplexity,memory,memory.storage_after,latency.prefill,latency.decode",
    "report_dir": "harness-upgrade",
}


def add(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "upgrade", help="what an upgrade changes, measured on both sides (exit 0 no harm, 1 harm, 3 undecided)"
    )
    parser.add_argument("sides", nargs="+", metavar="SIDE", help="NAME==VERSION, a wheel, or a source directory")
    for setting in (setting for setting in SETTINGS if setting.name in TAKEN):
        default = DEFAULTS.get(setting.name, setting.default)
        parser.add_argument(f"--{setting.flag}", metavar=setting.metavar, help=f"{setting.help} (default: {default})")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, compare, write upgrade.md and print it; the exit status is the answer."""
    from harness.run import upgrade

    readers = {setting.name: setting.read for setting in SETTINGS}
    given = {name: getattr(arguments, name) or DEFAULTS.get(name) for name in TAKEN}
    read = {name: readers[name](text) if text else None for name, text in given.items()}  # type: ignore[misc]
    _, declared = read_declared(Path.cwd())
    options = build(read, declared, Path.cwd())
    command = shlex.join(["python", "-m", "harness", *sys.argv[1:]])
    done = upgrade.run(arguments.sides, options, command, lambda line: print(line, file=sys.stderr, flush=True))
    print(done.text)
    return done.status
