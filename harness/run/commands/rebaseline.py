"""`rebaseline DIR`: what a finished session would change in the baselines, as a markdown diff; written with --write."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness.run import rebaseline


def add(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "rebaseline", help="what a session would change in the baselines, as a markdown diff; --write records it"
    )
    parser.add_argument("report", type=Path, metavar="DIR", help="a report directory")
    parser.add_argument("--baselines", type=Path, default=Path("baselines"), metavar="DIR", help="default: baselines")
    parser.add_argument(
        "--write", action="store_true", help="record what is proposed (default: off, nothing is written)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the proposal, and record it where that was asked."""
    proposal = rebaseline.propose(arguments.report, arguments.baselines)
    print(rebaseline.render(proposal))
    if not proposal.figures and not proposal.facts:
        print("Nothing to record.")
    elif arguments.write:
        written = rebaseline.write(proposal, arguments.baselines)
        print("\n".join(f"wrote {path}" for path in written))
    else:
        print("Nothing was written. To record this: the same command with --write.")
    return 0
