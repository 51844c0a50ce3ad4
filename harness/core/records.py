"""The nouns that travel between processes and files: frozen, JSON in and out, no torch.

What a line of measurements.jsonl must hold to be a row, and what it shares with the lines before it.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from typing import Any, NamedTuple
from urllib.parse import quote

from harness.core.values import decode_number, encode, parse_line, sha256_text

SCHEMA = 1  # of measurements.jsonl and of baseline files; a newer one is refused by name
CHECKED = re.compile(rb', "check": "([0-9a-f]{16})"}$')  # how a line of measurements.jsonl ends; its digest
CHECKED_LENGTH = len(', "check": ""}') + 16


class Verdict(StrEnum):
    """The words of a judgement, most severe first (the order of the members is the severity)."""

    MISSING = "missing"
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

    @classmethod
    def from_dict(cls, data: Any) -> Case:
        """Read `told` of one back; TypeError where it is anything else."""
        if not isinstance(data, dict) or set(map(type, data.values())) - {str}:
            raise TypeError("a case is a table of texts")
        return cls(**data)

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

    `value` is None exactly for `missing` rows, and then `reason` says why.
    """

    model: str
    method: str
    metric: str
    device: str
    reference: str
    dataset: str = ""
    protocol: str = ""
    revision: str = ""  # commit of a Hub model, or sha256 of the weights
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
    def stopped_early(self) -> bool:
        """Whether the case was decided before its text ended (`--stop-early`): no whole-text figure."""
        return "tokens_used" in self.detail and not self.detail.get("whole")

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
        return {name: getattr(self, name) for name in row_fields()}

    @classmethod
    def from_json(cls, text: str | bytes, censuses: Censuses | None = None) -> Row:
        """Read a line back; ValueError on a newer schema, an unreadable line, or one that was changed.

        `censuses` holds what rows before it had: a row with an equal census shares it, most of its bytes.
        """
        line = (text if isinstance(text, bytes) else text.encode()).strip()
        data = parse_line(line)
        if not isinstance(data, dict) or type(data.get("schema")) is not int:
            raise ValueError("not a measurement: no schema number")
        if data["schema"] > SCHEMA:
            raise ValueError(f"schema {data['schema']} is newer than this harness reads ({SCHEMA}): upgrade it")
        end = CHECKED.match(line, max(0, len(line) - CHECKED_LENGTH))  # lines of older harnesses have none
        if end and end[1].decode() != sha256_text(line[: end.start()] + b"}"):
            raise ValueError("it was changed after it was written: its digest differs")
        data.pop("check", None)
        if not data.keys() <= (known := row_fields()).keys():
            data = {name: value for name, value in data.items() if name in known}
        require_types(data)
        if censuses is not None:
            censuses.share(data)
        for name in ("value", "spread", "bits_per_weight", "seconds"):
            if type(data.get(name)) is str:
                data[name] = decode_number(data[name])
        if interval := data.get("interval"):
            data["interval"] = tuple(map(decode_number, interval))
        data["samples"] = tuple(map(decode_number, data.get("samples", ())))
        data["verdict"] = Verdict(data["verdict"])
        for name in ("verdict_reference", "verdict_baseline"):
            data[name] = Verdict(data[name]) if data.get(name) else None
        row = object.__new__(cls)  # not by __init__, which takes a fifth of the time of reading a line
        object.__setattr__(row, "__dict__", data if len(data) == len(known) else {**defaults(), **data})
        return row


def defaults() -> dict[str, Any]:
    """What a row has that is not said."""
    return {**_plain_defaults(), "detail": {}, "census": {}}


@functools.cache
def _plain_defaults() -> dict[str, Any]:
    return {item.name: item.default for item in fields(Row) if item.default is not MISSING}


@functools.cache
def row_fields() -> dict[str, None]:
    """The names of a row's fields, in their order."""
    return dict.fromkeys(item.name for item in fields(Row))


# fields whose few values stand in many rows
REPEATED = tuple(
    "model method metric device reference dataset protocol revision method_id protocol_id token_hash unit baseline "
    "environment reason".split()
)
TEXT, NONE = frozenset({str}), type(None)
KINDS: dict[str, frozenset[type]] = {  # of a row's fields in JSON; every other is text
    **dict.fromkeys(("value", "spread", "bits_per_weight"), frozenset({float, int, NONE})),
    **dict.fromkeys(("verdict_reference", "verdict_baseline"), frozenset({str, NONE})),
    **dict.fromkeys(("detail", "census"), frozenset({dict})),
    **dict.fromkeys(("count", "schema"), frozenset({int})),
    "seconds": frozenset({float, int}),
    "interval": frozenset({NONE}),
    "samples": frozenset(),
}
NUMBERS = frozenset({int, float})
LISTS = frozenset({"interval", "samples"})
MOST_KINDS = 1_000  # remembered; a session's rows have some ten
_sound_kinds: set[tuple[Any, ...]] = set()
NEEDED = frozenset({"model", "method", "metric", "device", "reference", "verdict"})


def require_types(data: dict[str, Any]) -> None:
    """ValueError with the first field of a row that is not what it should be: the line may be a stranger's."""
    if not data.keys() >= NEEDED:
        raise ValueError(f"it has no '{min(NEEDED - data.keys())}'")
    kinds = (*data, *map(type, data.values()))
    known = kinds in _sound_kinds  # the same fields of the same kinds were looked at: the lists are left
    plain = True
    for name in LISTS & data.keys() if known else data:
        if type(value := data[name]) not in KINDS.get(name, TEXT):
            if not _lists_or_words(name, value):
                raise ValueError(f"its '{name}' is no such thing as a {name}")
            plain &= name in LISTS
    if plain and not known and len(_sound_kinds) < MOST_KINDS:
        _sound_kinds.add(kinds)


def _lists_or_words(name: str, value: Any) -> bool:
    """Whether a field holds a list of numbers, or a number that JSON has no digits for."""
    if name in LISTS:
        numbers = type(value) is list and (NUMBERS.issuperset(map(type, value)) or all(map(_is_number, value)))
        return numbers and (name == "samples" or len(value) == 2)
    return float in KINDS.get(name, TEXT) and isinstance(decode_number(value), float)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) or isinstance(decode_number(value), float)


class Censuses:
    """The censuses of lines read so far: a group's rows hold one each, and it is most of their bytes."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, Any], Any] = {}  # the last one of each model under a method

    def share(self, data: dict[str, Any]) -> None:
        """Let a row's fields be the very objects of rows before it where they are equal."""
        intern = sys.intern
        for name in REPEATED:
            if value := data.get(name):
                data[name] = intern(value)
        if census := data.get("census"):
            place = (data.get("model"), data.get("method_id"))
            known = self.known.get(place)
            if known is census or known == census:
                data["census"] = known
            else:
                self.known[place] = census
