"""From a figure to a verdict: the rules by which rows, records and reports are judged, and the records. No torch.

`verdicts` judges a row, `two_reports` two reports; both ask `rules`. `baselines` reads and writes what was recorded.
"""

from harness.judge.verdicts import fails, hold, judge, message

__all__ = ["fails", "hold", "judge", "message"]
