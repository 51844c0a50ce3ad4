"""`merge DIR... -o OUT`: join the report directories of shards into the report that one run would have given."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from harness import judge
from harness.run.merge import merge

HARM, UNDECIDED = 1, 3
SHOWN = 20  # reasons that are printed


def add(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "merge", help="join shards' report directories (exit 0 complete, 1 harm, 3 cases are missing)"
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="report directories of shards")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="a new directory for the whole")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Merge and say what is there, what is not, and where the report lies."""
    merged = merge(arguments.directories, arguments.out)
    missing = [row for row in merged.rows if row.value is None]
    harm = [row for row in merged.rows if judge.fails(row, require_baselines=False, allow_missing=True)]
    print(f"{len(merged.rows):,} planned, {len(merged.rows) - len(missing):,} ran, {len(missing):,} missing")
    if merged.absent:
        print(f"shards that never came: {', '.join(map(str, merged.absent))}")
    reasons = Counter(row.reason for row in missing)
    for reason, count in list(reasons.items())[:SHOWN]:
        print(f"missing {count:,}: {reason}")
    if len(reasons) > SHOWN:
        print(f"… and {len(reasons) - SHOWN:,} more reasons, in the report")
    print(f"report: {merged.report}")
    return HARM if harm else UNDECIDED if missing else 0
