"""`published`: every figure of the reports in baselines/published, and what became of it. No weights, no network."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import published, report
from harness.published.ratios import beside, of_baselines, of_rows
from harness.published.writing import Entry
from harness.results.reading import keep_published, published_json

HEADING = """\
# Published figures, computed again

Made by `python -m harness published --markdown > docs/published.md`, from the claims in `baselines/published`, the
architectures, and the times recorded in `baselines` alone. *Reproduced* is to the last printed digit. *Storage* is
every byte that the corresponding method of ours holds, quantization state included; the last column adds up the
difference to the published figure.
"""


def page(entries: Sequence[Entry]) -> str:
    """docs/published.md."""
    return f"{HEADING}\n{published.section(entries)}"


def add(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("published", help="a verdict on every figure of published reports")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--markdown", action="store_true", help="as the page docs/published.md")
    parser.add_argument("--claims", type=Path, metavar="DIR", help="default: baselines/published, here or in the clone")
    parser.add_argument(
        "--report-dir",
        type=Path,
        metavar="DIR",
        help="put the figures into this session's report, its own ratios of times beside the published ones",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the verdicts; always 0, since a refuted claim is no harm of ours."""
    folder = arguments.claims or published.default_folder(Path.cwd())
    directory: Path | None = arguments.report_dir
    measured = of_rows(report.read_report(directory).rows) if directory else of_baselines(folder.parent)
    entries = beside([published.entry(judgement) for judgement in published.judge(published.read(folder))], measured)
    path = ""
    if directory:
        keep_published(directory, entries)
        path = str(report.rewrite(directory))
    if arguments.json:
        print(published_json(entries))
    elif arguments.markdown:
        print(page(entries), end="")
    elif path:
        print(f"{published.summary(entries)}\nreport: {path}")  # which holds the table
    else:
        print(published.table(entries))
    return 0
