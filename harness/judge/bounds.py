"""Tolerable losses, allowances and noise, each with its reason: the package's bounds.toml, then the user's over it."""

from __future__ import annotations

import math
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from harness.core.contracts import DEFAULT_DTYPES, DTYPES
from harness.core.environment import Environment
from harness.core.records import Case
from harness.core.schema import SCHEMA, Table, read_toml
from harness.core.specification import parse_method
from harness.core.text import percent

DEFAULTS = Path(__file__).with_name("bounds.toml")
NAME = "bounds.toml"
LIMITS = ("ratio", "at_most", "at_least")
ALLOWED = {"reference": LIMITS, "record": ("ratio",), "floor": ("at_most",)}  # kinds of limit by table
INT8 = "int8"
COMPUTES = (*DTYPES, INT8)
INT8_ACTIVATIONS = ("bnb-int8", "absmax-int8-w8a8", "torchao-int8-dynamic")  # methods that round them to codes
REPACKS = (0, 49)  # the bitsandbytes that first computes 4-bit products in bf16 where AVX512-BF16 is
Patterns = Annotated[tuple[str, ...], Meta(min_length=1)]
Nats = Annotated[float, Meta(ge=0)]


class Ran(NamedTuple):
    """What a case ran in."""

    compute: str  # a word of COMPUTES
    device_class: str  # 'cpu:avx512', or the bare device where no environment is known


def ran(case: Case, method_id: str = "", environment: Environment | None = None) -> Ran:
    """Of a case whose method was written out so, in that environment; what is not given, its specification says."""
    world = environment.device_class if environment else case.device
    return Ran(compute_of(method_id or case.method, case.device, environment), world)


def compute_of(method: str, device: str, environment: Environment | None = None) -> str:
    """What products round to: 'fp32', 'bf16', 'fp16', or 'int8' where activations are rounded to codes.

    It follows what runs, not what is spelled: a dtype that is not given is the device's default, and bitsandbytes
    computes 4-bit products in bf16 on processors with AVX512-BF16 (0.49 and later) whatever is asked for.

    Args:
        method: a specification, best with every argument written out (`Row.method_id`).
        device: 'cpu' or 'cuda'.
        environment: that it ran in, where it is known.
    """
    asked = parse_method(method)
    given = dict(asked.arguments)
    if asked.name in INT8_ACTIVATIONS:
        return INT8
    if asked.name.startswith("bnb-") and environment and device == "cpu":
        version = tuple(map(int, re.findall(r"\d+", environment.bitsandbytes)[:2]))
        if version >= REPACKS and "avx512_bf16" in environment.instructions.split():
            return "bf16"
    own = asked.name if asked.name in DTYPES else DEFAULT_DTYPES[device]
    compute = given.get("compute", "")
    return compute if compute in DTYPES else given.get("dtype", own)


class Selected(Table, frozen=True):
    """The cases that an entry of the file speaks of, and why."""

    reason: str
    models: Patterns = ()  # absent: all
    methods: Patterns = ()  # of the whole specification or of its name
    metrics: Patterns = ()
    devices: Patterns = ()  # 'cpu', or a device class: 'cuda:sm_90'
    computes: Patterns = ()  # words of COMPUTES: what runs, however the method is spelled
    references: Patterns = ()  # absent: of the same model, where it is what is bounded

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ValueError("it gives no reason: a limit without one cannot be reviewed")
        if unknown := sorted(set(self.computes) - set(COMPUTES)):
            raise ValueError(f"computes are of {', '.join(COMPUTES)}, not '{unknown[0]}'")

    def meets(self, case: Case, run: Ran | None = None) -> bool:
        """Whether every kind of pattern given has one that matches the case as it ran."""
        run = run or ran(case)
        named = (
            (self.models, (case.model,)),
            (self.methods, (case.method, case.method.partition(":")[0])),
            (self.metrics, (case.metric,)),
            (self.devices, (case.device, run.device_class)),
            (self.computes, (run.compute,)),
            (self.references, (case.reference,)),
        )
        return all(
            any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
            for patterns, names in named
            if patterns
        )


class Rule(Selected, frozen=True):
    """One limit."""

    ratio: Annotated[float, Meta(ge=1)] | None = None  # how many times the figure may be
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        if sum(getattr(self, name) is not None for name in LIMITS) != 1:
            raise ValueError(f"it needs one of {', '.join(LIMITS)}")
        if not math.isfinite(self.value):
            raise ValueError(f"{self.kind} must be a finite number, not {self.value}")
        Selected.__post_init__(self)

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

    def __str__(self) -> str:
        """'at most 0.5%', 'at most 0.01', 'at least 0.9'."""
        if self.kind == "ratio":
            return f"at most {percent(self.limit, sign='')}"
        return f"{self.kind.replace('_', ' ')} {self.value:g}"


class Noise(Selected, frozen=True, kw_only=True):
    """How far a loss moves from run to run where nothing changed but threads, kernels and the like; nats."""

    token: Nats  # root mean square of a token's change
    shift: Nats  # standard deviation, over runs, of what a run moves all tokens by

    def __post_init__(self) -> None:
        if not math.isfinite(self.token + self.shift):
            raise ValueError("token and shift must be finite numbers")
        Selected.__post_init__(self)


S = TypeVar("S", bound=Selected)


class Bounds(Table, frozen=True):
    """Every rule by its table, in order: the last that matches a case holds.

    `run` says what the case ran in; without it only the case's specification does.
    """

    schema: int = SCHEMA
    reference: tuple[Rule, ...] = ()
    record: tuple[Rule, ...] = ()
    floors: tuple[Rule, ...] = msgspec.field(default=(), name="floor")
    noises: tuple[Noise, ...] = msgspec.field(default=(), name="noise")

    def __post_init__(self) -> None:
        for (table, kinds), rules in zip(ALLOWED.items(), (self.reference, self.record, self.floors), strict=True):
            for number, rule in enumerate(rules, 1):
                if rule.kind not in kinds:
                    raise ValueError(f"{table} {number}: no place for '{rule.kind}' (known: {', '.join(kinds)})")

    def against_reference(self, case: Case, run: Ran | None = None) -> Rule | None:
        """The tolerable loss against the reference; None where nothing is promised.

        Against another model's only a rule that names references speaks: the others are of what a method loses.
        """
        other = parse_method(case.reference).model
        rules = tuple(rule for rule in self.reference if rule.references) if other else self.reference
        return _last(rules, case, run)

    def allowance(self, case: Case, run: Ran | None = None) -> float:
        """The ratio to the recorded value up to which a figure is not worse; 1.0 where no rule speaks."""
        rule = _last(self.record, case, run)
        return rule.value if rule else 1.0

    def floor(self, case: Case, run: Ran | None = None) -> float:
        """The change below which there is only noise, in the figure's unit; 0.0 where no rule speaks."""
        rule = _last(self.floors, case, run)
        return rule.value if rule else 0.0

    def noise(self, case: Case, run: Ran | None = None) -> tuple[float, float]:
        """Nats that a loss's tokens and its mean move by from run to run (`Noise`); zeros where no rule speaks."""
        rule = _last(self.noises, case, run)
        return (rule.token, rule.shift) if rule else (0.0, 0.0)


def _last(rules: tuple[S, ...], case: Case, run: Ran | None) -> S | None:
    return next((rule for rule in reversed(rules) if rule.meets(case, run)), None)


def load(folder: Path) -> Bounds:
    """The package's rules, then those of `folder`/bounds.toml where there is one.

    BadFile, one line with the file and what to write instead: no TOML, an unknown table or key, a newer schema,
    a value of the wrong kind, a rule without a reason.
    """
    own, path = packaged(), folder / NAME
    if not path.exists():
        return own
    users = read_toml(path, Bounds)
    names = ("reference", "record", "floors", "noises")
    return Bounds(SCHEMA, *(getattr(own, name) + getattr(users, name) for name in names))


def packaged() -> Bounds:
    """The package's rules alone."""
    return read_toml(DEFAULTS, Bounds)
