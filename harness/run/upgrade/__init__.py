"""What an upgrade changes: one environment a side, the same cases on each in turn, and one report."""

from harness.run.upgrade.answering import Done, run

__all__ = ["Done", "run"]
