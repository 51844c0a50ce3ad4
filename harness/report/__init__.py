"""The report of a session, its plots, and the comparison of two sessions. Pure functions of rows; no torch."""

from harness.report.comparison import SideFacts, Step, render_upgrade, worst
from harness.report.document import compare, excerpt, read_report, render, rewrite, write

__all__ = [
    "SideFacts",
    "Step",
    "compare",
    "excerpt",
    "read_report",
    "render",
    "render_upgrade",
    "rewrite",
    "worst",
    "write",
]
