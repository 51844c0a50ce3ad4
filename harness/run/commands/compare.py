"""`compare A B`: two report directories token by token, or two bare measurements.jsonl files by value."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("compare", help="what moved between two sessions (exit 0 fine, 1 harm, 3 undecided)")
    parser.add_argument("before", type=Path, metavar="A", help="a report directory, or a measurements.jsonl")
    parser.add_argument("after", type=Path, metavar="B", help="the other one")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison; the exit status is its answer."""
    from harness import report  # not for --help

    comparison = report.compare_paths(arguments.before, arguments.after)
    print(report.render_comparison(comparison))
    return comparison.status
