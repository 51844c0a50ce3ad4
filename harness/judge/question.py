"""One judgement's question: a row, and what stood before it; and the form of every answer. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.core.contracts import Member
from harness.core.environment import Environment
from harness.core.records import Row, Verdict
from harness.core.stats import Estimate
from harness.judge.bounds import Bounds
from harness.judge.recorded import Recorded

Losses = Callable[[str], NDArray[np.float32] | None]  # per-token NLL, nats, by its sha; None where nobody has it


@dataclass(frozen=True)
class Outcome:
    """One comparison's answer; `verdict` None where nothing is promised. `change` is in nats or the figure's unit."""

    verdict: Verdict | None
    reason: str = ""
    change: Estimate | None = None
    floor: float = 0.0  # a change up to here is noise
    p: float | None = None  # of the change, where it was tested (`error_rate`)
    smallest: str = ""  # effect that this comparison could have seen, in words
    ground: str = ""  # what it rests on, a word of `rules`


@dataclass(frozen=True)
class Question:
    """Everything that one judgement looks at.

    What stood before is a record, or a row of an earlier report; a record is a row with fewer fields.
    """

    row: Row
    member: Member
    bounds: Bounds
    before: Row | Recorded | None
    nll: Losses  # of both
    environment: Environment | None = None  # the row's own; None where environments and weights may differ
    tests: int = 1  # statistical tests that share one error rate (`error_rate`)

    @property
    def floor(self) -> float:
        """The larger of the bound's noise floor and the recorded one, nats (or the figure's unit)."""
        recorded = self.before.floor if isinstance(self.before, Recorded) else None
        return max(self.bounds.floor(self.row.case), recorded or 0.0)

    @property
    def allowance(self) -> float:
        """The ratio to the figure before up to which the bounds tolerate a change, at least 1."""
        return self.bounds.allowance(self.row.case)

    @property
    def room(self) -> float:
        """The change on this very text beyond which it moved, nats; infinite where no rule speaks."""
        return math.log(self.allowance) if self.allowance > 1 else math.inf

    def losses(self, sha: Any) -> NDArray[np.float64] | None:
        """Losses by sha in float64; None where there is no sha or no file, or they are not those of the windows."""
        values = self.nll(sha) if isinstance(sha, str) and sha else None
        windows = self.row.windows
        if values is None or not windows or len(values) != windows[-1].stop:
            return None
        return values.astype(np.float64)


def read(row: Row) -> str:
    """How much of its text an early-stopped case read: '4,088 of 75,530 tokens'."""
    return f"{row.detail['tokens_used']:,} of {row.detail['tokens_available']:,} tokens"


def stopped(row: Row) -> str:
    """Why an early-stopped case has no figure to compare."""
    return f"stopped early ({row.detail['decided']}) after {read(row)}: no whole-text figure"
