"""Tolerable losses and noise floors, each with its reason: the package's bounds.toml, then the user's over it."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from harness.core.records import Case
from harness.core.schema import SCHEMA, Table, read_toml
from harness.core.text import percent

DEFAULTS = Path(__file__).with_name("bounds.toml")
NAME = "bounds.toml"
LIMITS = ("ratio", "at_most", "at_least")
ALLOWED = {"reference": LIMITS, "record": ("ratio",), "floor": ("at_most",)}  # kinds of limit by table
Patterns = Annotated[tuple[str, ...], Meta(min_length=1)]


class Rule(Table, frozen=True):
    """One limit, the cases that it speaks of, and why: an entry of the file."""

    reason: str
    ratio: Annotated[float, Meta(ge=1)] | None = None  # how many times the figure may be
    at_most: float | None = None
    at_least: float | None = None
    models: Patterns = ()  # absent: all
    methods: Patterns = ()  # of the whole specification or of its name
    metrics: Patterns = ()
    devices: Patterns = ()

    def __post_init__(self) -> None:
        if sum(getattr(self, name) is not None for name in LIMITS) != 1:
            raise ValueError(f"it needs one of {', '.join(LIMITS)}")
        if not math.isfinite(self.value):
            raise ValueError(f"{self.kind} must be a finite number, not {self.value}")
        if not self.reason.strip():
            raise ValueError("it gives no reason: a limit without one cannot be reviewed")

    @property
    def kind(self) -> str:
        """'ratio', 'at_most' or 'at_least'."""
        return next(name for name in LIMITS if getattr(self, name) is not None)

    @property
    def value(self) -> float:
        """The limit as it is written."""
        return float(getattr(self, self.kind))

    @property
    def limit(self) -> float:
        """The limit in the figure's unit: the logarithm of a ratio, in nats."""
        return math.log(self.value) if self.kind == "ratio" else self.value

    def meets(self, case: Case) -> bool:
        """Whether every kind of pattern given has one that matches the case."""
        named = (
            (self.models, (case.model,)),
            (self.methods, (case.method, case.method.partition(":")[0])),
            (self.metrics, (case.metric,)),
            (self.devices, (case.device,)),
        )
        return all(
            any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
            for patterns, names in named
            if patterns
        )

    def __str__(self) -> str:
        """'at most 0.5%', 'at most 0.01', 'at least 0.9'."""
        if self.kind == "ratio":
            return f"at most {percent(self.limit, sign='')}"
        return f"{self.kind.replace('_', ' ')} {self.value:g}"


class Bounds(Table, frozen=True):
    """Every rule by its table, in order: the last that matches a case holds."""

    schema: int = SCHEMA
    reference: tuple[Rule, ...] = ()
    record: tuple[Rule, ...] = ()
    floors: tuple[Rule, ...] = msgspec.field(default=(), name="floor")

    def __post_init__(self) -> None:
        for (table, kinds), rules in zip(ALLOWED.items(), (self.reference, self.record, self.floors), strict=True):
            for number, rule in enumerate(rules, 1):
                if rule.kind not in kinds:
                    raise ValueError(f"{table} {number}: no place for '{rule.kind}' (known: {', '.join(kinds)})")

    def against_reference(self, case: Case) -> Rule | None:
        """The tolerable loss against the reference; None where nothing is promised."""
        return _last(self.reference, case)

    def allowance(self, case: Case) -> float:
        """The ratio to the recorded value up to which a figure is not worse; 1.0 where no rule speaks."""
        rule = _last(self.record, case)
        return rule.value if rule else 1.0

    def floor(self, case: Case) -> float:
        """The change below which there is only noise, in the figure's unit; 0.0 where no rule speaks."""
        rule = _last(self.floors, case)
        return rule.value if rule else 0.0


def _last(rules: tuple[Rule, ...], case: Case) -> Rule | None:
    return next((rule for rule in reversed(rules) if rule.meets(case)), None)


def load(folder: Path) -> Bounds:
    """The package's rules, then those of `folder`/bounds.toml where there is one.

    BadFile, one line with the file and what to write instead: no TOML, an unknown table or key, a newer schema,
    a value of the wrong kind, a rule without a reason.
    """
    own, path = packaged(), folder / NAME
    users = read_toml(path, Bounds) if path.exists() else Bounds()
    return Bounds(SCHEMA, own.reference + users.reference, own.record + users.record, own.floors + users.floors)


def packaged() -> Bounds:
    """The package's rules alone."""
    return read_toml(DEFAULTS, Bounds)
