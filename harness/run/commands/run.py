"""`run [--engine ray] ...`: measure a matrix as pytest does, with pytest's options, wherever the current folder is."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

CASES = "harness.cases.test_measured"


def add(subparsers: Any) -> None:
    """Declare the command; what follows it is pytest's to read."""
    parser = subparsers.add_parser(
        "run",
        help="measure: pytest's cases and options (run --engine ray --models gpt2); exit status as pytest's",
        prefix_chars="\0",  # so that no option is read here
        add_help=False,
    )
    parser.add_argument("options", nargs="*", metavar="OPTION", help="of `pytest --pyargs harness.cases`")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run pytest on the package's cases in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-p", "harness.plugin", "-p", "no:cacheprovider", "--pyargs", CASES]
    return subprocess.run([*command, *arguments.options], check=False).returncode
