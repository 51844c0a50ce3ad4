"""The report of a session, its plots, and the comparison of two sessions. Pure functions of rows; no torch.

`render` makes text from rows; `read_report` and `write` are the only ones here that touch files.
"""

from harness.judge.two_reports import Comparison, Entry, compare
from harness.report.comparison import SideFacts, Step, render_comparison, render_upgrade, worst
from harness.report.document import excerpt, render, rewrite, write
from harness.results.directory import SavedSession, nll_reader, read_report

__all__ = [
    "Comparison",
    "Entry",
    "SavedSession",
    "SideFacts",
    "Step",
    "compare",
    "excerpt",
    "nll_reader",
    "read_report",
    "render",
    "render_comparison",
    "render_upgrade",
    "rewrite",
    "worst",
    "write",
]
