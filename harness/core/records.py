"""The nouns that travel between processes and files, and what a line of measurements.jsonl must hold. No torch."""

from __future__ import annotations

import functools
import itertools
import json
import re
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec

from harness.core.schema import SCHEMA, check
from harness.core.values import encode, parse_json, sha256_text

CHECKED = re.compile(rb', "check": "([0-9a-f]{16})"}$')  # how a line of measurements.jsonl ends; its digest
CHECKED_LENGTH = len(', "check": ""}') + 16


class Verdict(StrEnum):
    """The words of a judgement, most severe first (the order of the members is the severity)."""

    MISSING = "missing"
    INPUT_CHANGED = "input changed"
    OUT_OF_BOUND = "out of bound"
    WORSE = "worse"
    UNUSABLE = "unusable"
    NOT_COMPARABLE = "not comparable"
    UNRECORDED = "unrecorded"
    BETTER = "better"
    WITHIN_NOISE = "within noise"
    SAME = "same"
    WITHIN_BOUND = "within bound"

    @property
    def severity(self) -> int:
        """0 for the most severe."""
        return SEVERITY[self]


SEVERITY = {verdict: place for place, verdict in enumerate(Verdict)}


@functools.cache  # the names of a plan are few, its cases many
def quoted(part: str) -> str:
    """Percent-encoded where it would be ambiguous between slashes."""
    return quote(part, safe=":=@.,-_+~*")


class Case(NamedTuple):
    """model x method x dataset x protocol x metric x device: one line of the plan.

    Every field is canonical specification text; `dataset` and `protocol` are "" for metrics that read no text.
    A tuple, since a large plan hashes and compares its cases a dozen times.
    """

    model: str
    method: str
    dataset: str
    protocol: str
    metric: str
    device: str  # "cpu" or "cuda"
    reference: str = "fp32"

    def told(self) -> dict[str, Any]:
        """Every field by name, in order."""
        return dict(zip(self._fields, self, strict=True))

    @property
    def id(self) -> str:
        """The pytest id: fields joined by '/', each percent-encoded where it would be ambiguous."""
        parts = (self.model, self.method, self.dataset, self.protocol, self.metric, self.device)
        return "/".join(map(quoted, filter(None, parts)))

    @property
    def group(self) -> str:
        """What shares one child process: a model under a method on a device."""
        return "/".join(map(quoted, (self.model, self.method, self.device)))

    @property
    def family(self) -> str:
        """The metric's file: 'memory' for 'memory.storage'."""
        return self.metric.partition(".")[0]


@dataclass(frozen=True)
class Figure:
    """What a metric returns: one number with its unit, how many observations, and how they spread.

    `spread` is an interquartile range or standard error in `unit` (the metric's docstring says which);
    `interval` is a two-sided 95% interval in `unit`; `samples` are raw observations in `unit`.
    """

    value: float
    unit: str
    count: int = 1
    spread: float | None = None
    interval: tuple[float, float] | None = None
    samples: tuple[float, ...] = ()
    detail: dict[str, Any] = field(default_factory=dict)  # JSON: what the judge or the report wants beside it


@dataclass(frozen=True)
class Row:
    """One line of measurements.jsonl: a case, what was measured, and what was decided.

    `value` is None for `missing` rows, and for those that are left out: `reason` says why.
    """

    model: str
    method: str
    metric: str
    device: str
    reference: str
    dataset: str = ""
    protocol: str = ""
    revision: str = ""  # commit of a Hub model, or sha256 of the weights
    identity: str = ""  # digest of everything that the computation is made of (`core.identity`)
    method_id: str = ""  # the method with every argument written out, dtype and batch size too
    protocol_id: str = ""
    token_hash: str = ""
    nll: str = ""  # sha256 naming nll/<sha>.npz
    value: float | None = None
    unit: str = ""
    count: int = 0
    spread: float | None = None
    interval: tuple[float, float] | None = None
    samples: tuple[float, ...] = ()
    detail: dict[str, Any] = field(default_factory=dict)
    census: dict[str, Any] = field(default_factory=dict)
    bits_per_weight: float | None = None
    verdict: Verdict = Verdict.UNRECORDED
    verdict_reference: Verdict | None = None
    verdict_baseline: Verdict | None = None
    baseline: str = ""  # the file that served, relative to the baselines folder
    reason: str = ""
    environment: str = ""  # id into environments.json
    seconds: float = 0.0
    key: str = ""  # content key for --resume
    schema: int = SCHEMA

    @functools.cached_property  # kept beside the fields, never among them: a report asks a dozen times
    def case(self) -> Case:
        """The case this row answers."""
        return Case(self.model, self.method, self.dataset, self.protocol, self.metric, self.device, self.reference)

    @property
    def left_out(self) -> bool:
        """Whether the text or the model can have no such figure: not measured, and nobody's failure."""
        return self.value is None and self.verdict is Verdict.NOT_COMPARABLE

    @property
    def missing(self) -> bool:
        """Whether a figure that could be had is not there."""
        return self.value is None and not self.left_out

    @property
    def run_as(self) -> str:
        """The protocol as it was run, where the model reads too little at once for the one asked for; else ''."""
        used = str(self.detail.get("protocol", ""))
        return "" if used == self.protocol else used

    @property
    def stopped_early(self) -> bool:
        """Whether the case was decided before its text ended (`--stop-early`): no whole-text figure."""
        return "tokens_used" in self.detail and not self.detail.get("whole")

    @property
    def live(self) -> bool:
        """Whether a caller's own module was measured: no command measures it again."""
        return bool(self.detail.get("live"))

    @property
    def windows(self) -> list[slice]:
        """Each window's place in the flat per-token losses; empty for figures of no text."""
        counts = self.detail.get("window_counts") or ()
        return [slice(end - count, end) for end, count in zip(itertools.accumulate(counts), counts, strict=True)]

    @classmethod
    def of(cls, case: Case, **measured: Any) -> Row:
        """A row for a case."""
        return cls(**case.told(), **measured)

    def to_json(self) -> str:
        """One line of strict JSON: NaN and infinities become strings; at its end stands a digest of all the rest."""
        body = json.dumps(encode(self.told()), sort_keys=True, allow_nan=False)
        return f'{body[:-1]}, "check": "{sha256_text(body)}"}}'

    def told(self) -> dict[str, Any]:
        """Every field by name, as it is."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_json(cls, text: str | bytes) -> Row:
        """Read a line back; ValueError on a newer schema, an unreadable line, or one that was changed."""
        line = (text if isinstance(text, bytes) else text.encode()).strip()
        try:
            if b'"schema"' not in line:  # to the quick reader it would be the present one
                raise ValueError
            row = READER.decode(line)
        except (ValueError, RecursionError):  # told by a slower reader, which knows lone surrogates too
            row = check(parse_json(line), cls, strict=False)
        if row.schema > SCHEMA:
            check({"schema": row.schema}, cls)
        end = CHECKED.match(line, max(0, len(line) - CHECKED_LENGTH))  # lines of older harnesses have none
        if end and end[1].decode() != sha256_text(line[: end.start()] + b"}"):
            raise ValueError("it was changed after it was written: its digest differs")
        return row


READER = msgspec.json.Decoder(Row, strict=False)
