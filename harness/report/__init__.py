"""The report of a session, its plots, and the comparison of two sessions. Pure functions of rows; no torch.

`render` makes text from rows; `read_report` and `write` are the only ones here that touch files.
"""

from harness.judge.two_reports import Comparison, Entry, compare
from harness.report.comparison import render_comparison
from harness.report.document import render
from harness.report.publishing import compare_paths, excerpt, files, put, remember, rewrite, write
from harness.report.upgrade_report import SideFacts, Step, render_upgrade, worst
from harness.results.reading import Session, nll_reader, read_report

__all__ = [
    "Comparison",
    "Entry",
    "Session",
    "SideFacts",
    "Step",
    "compare",
    "compare_paths",
    "excerpt",
    "files",
    "nll_reader",
    "put",
    "read_report",
    "remember",
    "render",
    "render_comparison",
    "render_upgrade",
    "rewrite",
    "worst",
    "write",
]
