"""What the controller and a group's process say to each other: picklable, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.core.options import Options
from harness.core.records import Case, Figure, Row
from harness.metrics.measuring.sequential import ALPHA


@dataclass(frozen=True)
class Job:
    """What a group's process needs to know: complete."""

    options: Options
    model: str
    method: str
    device: str
    reference: str
    threads: int
    log: Path  # the process's stdout and stderr
    inputs: Mapping[str, str] = field(default_factory=dict)  # what the session's weights and texts were at its start
    visible: str | None = None  # CUDA_VISIBLE_DEVICES of the process that asks; its fork server's may be older


@dataclass(frozen=True)
class Stop:
    """When an early-stopped delta is decided: nats. Without a recorded `variance` the whole text is read."""

    bound: float | None
    variance: float | None  # v, from the whole-text record of these tokens
    token_hash: str = ""  # of that record
    alpha: float = ALPHA  # error probability of the decision, both sides together


@dataclass(frozen=True)
class Asked:
    """A case, its finished row where the session resumes, and when an early-stopped delta is decided."""

    case: Case
    before: Row | None = None
    stop: Stop | None = None


@dataclass(frozen=True)
class Repetition:
    """One step of a timing interleaved over processes: `lead` untimed repetitions, then a timed one."""

    case: Case
    lead: int = 0
    figure: Figure | None = None  # what came of all of them: answered by the row that holds it


@dataclass(frozen=True)
class Reply:
    """One answer: a row, a key, predicted bytes, or why there is none."""

    # what `data` or `text` holds: 'row', 'key', 'seconds', 'done', ...; 'error' (one line), 'bug' (traceback)
    kind: str
    row: Row | None = None
    text: str = ""
    data: Mapping[str, Any] | None = None
    blamed: str = ""  # what of the machine failed (`errors`): behind a device error the process ends
