"""A recorded figure: what a baseline file says about one case, with everything needed to judge against it. No torch.

An entry of an overlay file is this noun without where it was found; its environment stands once in the file.
Floats are kept to ten significant digits, so that a person can review them and a second writing changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from msgspec import field
from msgspec.structs import fields, replace

from harness.core.environment import COMPILED, Environment
from harness.core.errors import BadFile
from harness.core.records import Row
from harness.core.schema import Table, fit
from harness.core.values import decode_number, digest

FIX = "restore it from version control, or delete it and record again with --regen-all"
DIGITS = 10  # a float32 loss has 7, a clock of nanoseconds 9
# of a row's detail, what a later judgement reads: losses of the reference, and how a timing was compared
KEPT = ("reference_nll", "log_ratio", "log_ratio_low", "log_ratio_high", "aa_floor", "reference_p50", "tokens")
PLACE = ("file", "carries", "difference")  # where it was found, never in the file


class Recorded(Table, frozen=True):
    """One figure of a baseline file; units as in the row that it came from."""

    metric: str
    device: str
    value: float
    unit: str
    count: int = 1
    dataset: str = ""
    protocol: str = ""
    reference: str = "fp32"
    spread: float | None = None
    interval: tuple[float, float] | None = None
    floor: float | None = None  # of the change, measured or set when it was recorded
    repeats: int = 1
    method_id: str = ""
    revision: str = ""
    protocol_id: str = ""
    token_hash: str = ""
    nll: str = ""  # nll/<sha>.npz beside the file
    detail: dict[str, Any] = field(default_factory=dict)
    recorded: str = ""  # when, UTC
    environment: Environment = Environment()
    file: str = ""  # that served, relative to the baselines folder
    carries: bool = True  # False: recorded for another class of environments
    difference: str = ""  # then, the field that differs: 'device class: cpu:avx2 -> cpu:avx512'

    def __post_init__(self) -> None:
        for name in ("value", "spread", "floor"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise ValueError(f"{name} must be finite, not {getattr(self, name)}")
        if self.interval and not self.interval[0] <= self.interval[1]:
            raise ValueError(f"interval must be two numbers, the lower first, not {list(self.interval)}")

    @classmethod
    def of_row(cls, row: Row, environment: Environment, when: str) -> Recorded:
        """The entry that records a row; ValueError for a row without a finite value."""
        if row.value is None or not math.isfinite(row.value):
            raise ValueError(f"{row.case.id}: only a finite figure can be recorded, not {row.value}")
        detail = {name: row.detail[name] for name in KEPT if row.detail.get(name) is not None}
        floor = decode_number(row.detail.get("floor"))
        taken = {item.name: getattr(row, item.name) for item in fields(cls) if item.name in Row.__dataclass_fields__}
        taken |= {"detail": detail, "floor": floor, "repeats": max(1, len(row.samples)), "environment": environment}
        return reviewable(cls(**taken, recorded=when))

    @property
    def key(self) -> tuple[str, ...]:
        """What another recording of the same thing replaces: a timing stands once a machine."""
        machine = self.environment.machine if "log_ratio" in self.detail else ""
        return (self.dataset, self.protocol, self.metric, self.device, self.reference, machine)

    def same_figure(self, other: Recorded) -> bool:
        """Whether both say the same, whenever and wherever they were recorded."""
        place: dict[str, Any] = {"file": "", "carries": True, "difference": ""}
        blank: dict[str, Any] = {**place, "recorded": "", "environment": Environment()}
        return replace(self, **blank) == replace(other, **blank)

    def to_entry(self) -> dict[str, Any]:
        """YAML: what is empty is left out, the environment is its key in the file."""
        entry: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in PLACE or value is None or value == "" or value == {}:
                continue
            if item.name == "environment":
                value = world_key(value)
            if item.name == "value" and self.unit == "B":
                value = int(value)
            entry[item.name] = list(value) if isinstance(value, tuple) else value
        return entry


def world_key(environment: Environment) -> str:
    """12 hex digits for an environment with its checkout: by it an entry names its world in the file."""
    return digest(world_facts(environment))[:12]


def world_facts(environment: Environment) -> dict[str, Any]:
    """An environment as a file of baselines holds it: what is so in all that were recorded before is left out."""
    return {key: value for key, value in environment.to_dict().items() if (key, value) != ("loops", COMPILED)}


def from_entry(where: str, entry: Mapping[str, Any], environments: Mapping[str, Environment]) -> Recorded:
    """Read one entry back; BadFile begins with `where` and names the field that is wrong."""
    key = str(entry.get("environment"))
    if key not in environments:
        raise BadFile(f"{where}: its environment '{key}' is not in the file; {FIX}")
    if places := set(PLACE) & entry.keys():
        raise BadFile(f"{where}: no place for '{min(places)}'; {FIX}")
    return fit({**entry, "environment": environments[key]}, Recorded, where, FIX)


def reviewable(recorded: Recorded) -> Recorded:
    """Every float to ten significant digits."""
    changed = {item.name: rounded(getattr(recorded, item.name)) for item in fields(recorded)}
    return replace(recorded, **{**changed, "environment": recorded.environment})


def rounded(value: Any) -> Any:
    """Floats inside a JSON value to ten significant digits, whole ones (bytes) as they are; tuples stay tuples."""
    if isinstance(value, float):
        return value if value.is_integer() else float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(rounded(item) for item in value)
    return value
