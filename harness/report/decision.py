"""One verdict of many rows: the most severe of what was decided, so that what has no record does not hide it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from harness.core.records import Row, Verdict
from harness.report.account import FAILING, NO_RECORD


class Decision(NamedTuple):
    """A verdict and the row that it comes from; how many comparisons beside it had no record, and their word."""

    verdict: Verdict
    row: Row
    alone: int = 0
    word: Verdict | None = None

    @property
    def aside(self) -> str:
        """'2 unrecorded' beside a verdict that was decided without them."""
        return f"{self.alone} {self.word}" if self.alone and self.verdict is not self.word else ""


def decide(rows: Iterable[Row]) -> Decision | None:
    """The decision of rows, each against the reference and against the record; None of no row."""
    found: list[tuple[Verdict, Row]] = []
    for row in rows:
        own = [verdict for verdict in (row.verdict_reference, row.verdict_baseline) if verdict]
        if not own or (row.verdict in FAILING and row.verdict not in own):  # as a changed fact, decided by neither
            own.append(row.verdict)
        found += [(word, row) for word in own]
    if not found:
        return None
    alone = [item for item in found if item[0] in NO_RECORD]
    decided = [item for item in found if item[0] not in NO_RECORD]
    verdict, row = min(decided or alone, key=lambda item: item[0].severity)
    word = min((item[0] for item in alone), key=lambda verdict: verdict.severity, default=None)
    return Decision(verdict, row, len(alone), word)
