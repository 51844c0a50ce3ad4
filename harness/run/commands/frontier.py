"""`frontier DIR...`: the methods on the Pareto front of quality, bytes and speed, a table and a plot a model."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.errors import HarnessError
from harness.core.files import replace_text
from harness.report import nll_reader, read_report
from harness.report.frontier import MEANING, heading, points, render, standings
from harness.report.matrix import complete, sections

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FEWEST = 2  # methods that can be compared


def add(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("frontier", help="which methods are on the front of quality, bytes and speed")
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR", help="report directories of one machine")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where plots go (default: the last DIR)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the tables, write the plots."""
    from harness.report.plots import frontier_plot

    found = [read_report(folder) for folder in arguments.directories]
    rows = complete([row for session in found for row in session.rows], [])
    readers = [nll_reader(session.folder) for session in found]

    def nll(sha: str) -> NDArray[np.float32] | None:
        return next((values for reader in readers if (values := reader(sha)) is not None), None)

    shown = 0
    for section in sections(rows):
        for text in section.texts:
            here = points(section, text)
            if len(here) < FEWEST:
                continue
            shown += 1
            places = standings(here, nll)
            head = heading(section, text)
            print(render(head, places))
            name = re.sub(r"[^A-Za-z0-9]+", "-", "-".join((section.model, section.device, *text))).strip("-").lower()
            home = arguments.output or arguments.directories[-1]
            path = (home if home.is_dir() else home.parent) / f"frontier-{name}.svg"
            replace_text(path, frontier_plot.svg(head.title, places))
            print(f"\nPlot: {path}\n")
    if not shown:
        raise HarnessError("no model has two methods with `perplexity.delta`: measure with --metrics perplexity,memory")
    print(MEANING)
    return 0
