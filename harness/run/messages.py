"""What the controller and a group's process say to each other: picklable, no torch.

A request is (number, verb, argument), and every reply comes as (number, `Reply`): the number of what it answers.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.core.options import Options
from harness.core.progress import Piece
from harness.core.records import Case, Figure, Row
from harness.metrics.measuring.sequential import ALPHA

UNFIT = "unfit"  # of what preparing answers: (case, reason) of those whose model or text cannot be had


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

    # what `data` or `text` holds: 'row', 'key', 'seconds', 'done', ...; 'error' or 'left out' (one line), 'bug'
    # (traceback); and before an answer 'at' (the step that it is at), 'said' (a line for the user), 'predicted' (bytes)
    kind: str
    row: Row | None = None
    text: str = ""
    data: Mapping[str, Any] | None = None
    blamed: str = ""  # what of the machine failed (`errors`): behind a device error the process ends


class ReplyLine:
    """The answering end of the pipe."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._number = 0  # of the request in hand
        self._one_at_a_time = threading.Lock()  # steps are told by several threads

    def receive(self) -> tuple[str, Any]:
        """The next request's verb and argument; EOFError where nobody asks any more."""
        self._number, verb, argument = self._connection.recv()
        return verb, argument

    def send(self, reply: Reply) -> None:
        """One reply to the request in hand."""
        with self._one_at_a_time:
            self._connection.send((self._number, reply))

    def at(self, piece: Piece) -> None:
        """Say which piece of work the answer has come to; its numbers only where somebody may show them."""
        self.send(Reply("at", text=piece.what, data=piece._asdict() if piece.shown else None))
