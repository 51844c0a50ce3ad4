"""`report DIR`: make report.md and its plots anew from a report directory's measurements, and print the report.

`report DIR --models A,B` prints the report of these models alone, without plots, and writes nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("report", help="make a report anew from its measurements, and print it")
    parser.add_argument("directory", type=Path, metavar="DIR", help="the report directory")
    parser.add_argument("--models", default="", metavar="A,B", help="print these models' part only, and write nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Rewrite and print, or print a part."""
    from harness import report  # not for --help

    if arguments.models:
        print(report.excerpt(arguments.directory, arguments.models.split(",")))
        return 0
    print(report.rewrite(arguments.directory).read_text(encoding="utf-8"))
    return 0
