"""Published figures of other people's reports, and what became of them when computed again.

`read(folder)` gives the claims, `judge(claims)` a verdict on each, `table`, `as_json` and `section` write them. Nothing
here imports torch before a claim is judged.
"""

from harness.published.claims import Claim, Report, default_folder, read
from harness.published.judging import Finding, Judgement, judge
from harness.published.writing import as_json, section, table

__all__ = ["Claim", "Finding", "Judgement", "Report", "as_json", "default_folder", "judge", "read", "section", "table"]
