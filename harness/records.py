"""The nouns that travel between processes and files: frozen, JSON in and out, no torch."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import sys
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from typing import Any
from urllib.parse import quote

# fields whose few values stand in many rows
REPEATED = tuple(
    "model method metric device reference dataset protocol revision method_id protocol_id token_hash unit baseline "
    "environment reason".split()
)
SCHEMA = 1  # of measurements.jsonl and of baseline files; a newer one is refused by name
CENSUS = '"census": '  # in a line of measurements.jsonl, before the census
DECODER = json.JSONDecoder()
CHECKED = re.compile(r', "check": "([0-9a-f]{16})"}$')  # how a line of measurements.jsonl ends; its digest
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


@dataclass(frozen=True, order=True)
class Case:
    """model x method x dataset x protocol x metric x device: one line of the plan.

    Every field is canonical specification text; `dataset` and `protocol` are "" for metrics that read no text.
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
        """Read `vars` of one back; TypeError where it is anything else."""
        if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
            raise TypeError("a case is a table of texts")
        return cls(**data)

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

    @classmethod
    def of(cls, case: Case, **measured: Any) -> Row:
        """A row for a case."""
        return cls(**vars(case), **measured)

    def to_json(self) -> str:
        """One line of strict JSON: NaN and infinities become strings; at its end stands a digest of all the rest."""
        body = json.dumps(encode(self.told()), sort_keys=True, allow_nan=False)
        return f'{body[:-1]}, "check": "{sha256_text(body)}"}}'

    def told(self) -> dict[str, Any]:
        """Every field by name, as it is."""
        return {name: getattr(self, name) for name in row_fields()}

    @classmethod
    def from_json(cls, text: str, censuses: Censuses | None = None) -> Row:
        """Read a line back; ValueError on a newer schema, an unreadable line, or one that was changed.

        `censuses` holds what rows before it had: a row with an equal census shares it, most of its bytes.
        """
        data = parse_json(text) if censuses is None else censuses.parse(text)
        if not isinstance(data, dict) or type(data.get("schema")) is not int:
            raise ValueError("not a measurement: no schema number")
        if data["schema"] > SCHEMA:
            raise ValueError(f"schema {data['schema']} is newer than this harness reads ({SCHEMA}): upgrade it")
        text = text.strip()
        end = CHECKED.match(text, max(0, len(text) - CHECKED_LENGTH))  # lines of older harnesses have none
        if end and end[1] != sha256_text(f"{text[: end.start()]}}}"):
            raise ValueError("it was changed after it was written: its digest differs")
        known = row_fields()
        if not data.keys() <= known.keys():
            data = {name: value for name, value in data.items() if name in known}
        _require_types(data)
        if censuses is not None:
            censuses.share(data)
        for name in ("value", "spread", "bits_per_weight", "seconds"):
            data[name] = decode_number(data.get(name))
        if data.get("interval") is not None:
            data["interval"] = tuple(decode_number(value) for value in data["interval"])
        data["samples"] = tuple(decode_number(value) for value in data.get("samples", ()))
        data["verdict"] = Verdict(data["verdict"])
        for name in ("verdict_reference", "verdict_baseline"):
            data[name] = Verdict(data[name]) if data.get(name) else None
        row = object.__new__(cls)  # not by __init__, which takes a fifth of the time of reading a line
        vars(row).update(defaults(), **data)
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


class Censuses:
    """The censuses of lines read so far: a group's rows hold one each, word for word, and it is most of their bytes."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}  # the last one of each model under a method
        self.text, self.value = "", None  # the last one read, as it stands in its line, and parsed

    def parse(self, text: str) -> Any:
        """`parse_json` of a line; a census that equals the line's before it letter by letter is not parsed again."""
        start = text.find(CENSUS) + len(CENSUS)
        if start < len(CENSUS):
            return parse_json(text)
        if self.text and text.startswith(self.text, start):
            data = parse_json(f"{text[:start]}null{text[start + len(self.text) :]}")
            if isinstance(data, dict) and data.get("census", "") is None:  # else it stood deeper, or twice
                data["census"] = self.value
                return data
        data = parse_json(text)
        if isinstance(data, dict) and isinstance(data.get("census"), dict):
            value, end = DECODER.raw_decode(text, start)
            if value == data["census"]:
                self.text, self.value = text[start:end], data["census"]
        return data

    def share(self, data: dict[str, Any]) -> None:
        """Let a row's fields be the very objects of rows before it where they are equal."""
        for name in REPEATED:
            if value := data.get(name):
                data[name] = sys.intern(value)
        if detail := data.get("detail"):
            data["detail"] = {sys.intern(name): value for name, value in detail.items()}
        if census := data.get("census"):
            place = f"{data.get('model')} {data.get('method_id')}"
            known = self.known.get(place)
            if known is census or known == census:
                data["census"] = known
            else:
                self.known[place] = census


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
LISTS = frozenset({"interval", "samples"})
MOST_KINDS = 1_000  # remembered; a session's rows have some ten
_sound_kinds: set[tuple[Any, ...]] = set()
NEEDED = frozenset({"model", "method", "metric", "device", "reference", "verdict"})


def _require_types(data: dict[str, Any]) -> None:
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
    if name in ("interval", "samples"):
        return isinstance(value, list) and all(map(_is_number, value)) and (name == "samples" or len(value) == 2)
    return float in KINDS.get(name, TEXT) and isinstance(decode_number(value), float)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) or isinstance(decode_number(value), float)


def parse_json(text: str | bytes) -> Any:
    """`json.loads` for files that a stranger may have written: nesting beyond reason is a ValueError too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def encode(value: Any) -> Any:
    """Make a value strict JSON: non-finite floats as 'nan', 'inf', '-inf'; tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def decode_number(value: Any) -> Any:
    """Undo `encode` for one number."""
    return float(value) if isinstance(value, str) and value in {"nan", "inf", "-inf"} else value


def sha256_text(text: str) -> str:
    """16 hex digits of a text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON value in canonical form."""
    text = json.dumps(encode(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
