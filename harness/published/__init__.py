"""Published figures of other people's reports, and what became of them when computed again.

`read(*places)` gives the claims, `judge(claims)` a verdict on each, `entry` a verdict as plain data, `beside` puts
ratios of times measured here beside published ones, `table` and `section` write entries. Nothing here imports torch
before a claim is judged.
"""

from harness.published.claims import Claim, Publication, places, read
from harness.published.judging import Finding, Judgement, judge
from harness.published.writing import beside, entry, of_baselines, of_rows, page, section, summary, table

__all__ = [
    "Claim",
    "Finding",
    "Judgement",
    "Publication",
    "beside",
    "entry",
    "judge",
    "of_baselines",
    "of_rows",
    "page",
    "places",
    "read",
    "section",
    "summary",
    "table",
]
