"""Known faults of libraries, as data: where one applies, what it looks like, and what that makes of an invariant's row.

The package's `known_faults.toml`, and that of a baselines folder beside it, hold one [[fault]] each:

    id = "name"                       reference = "address or file where it is told"
    invariant = ["state_dict"]        patterns of the invariant's name
    on = ["layer", "tiny-*"]          patterns of what it was run on; everything where absent
    methods = ["bnb-nf4"]             patterns of the method's name
    package = "bitsandbytes"          versions = ">=0.49.0,<=0.50.2"
    class = ["avx512_bf16"]           instruction sets or GPU classes (sm_90), one of which it needs; any where absent
    exception = "Type: first line"    exactly; or figure = [low, high], both ends included
    summary = "one line"              property = true where it is no bug but what the method is

An invariant that does not hold is green where a fault says so and looks as it says (`same`, the fault named), and
fails where it looks different or no fault speaks of it (`out of bound`). One that holds although a fault applies is
`better`, and its reason says that the fault is gone. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from msgspec import Meta, field
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from harness.core.environment import Environment
from harness.core.records import Case, Row, Verdict
from harness.core.schema import Table, read_toml
from harness.core.values import decode_number

NAME = "known_faults.toml"
SHIPPED = Path(__file__).with_name(NAME)
Text = Annotated[str, Meta(min_length=1)]
Patterns = Annotated[tuple[str, ...], Meta(min_length=1)]


class Fault(Table, frozen=True):
    """One known fault: an entry of the file."""

    id: Text
    invariant: Patterns
    methods: Patterns
    package: Text
    versions: Text
    reference: Text
    summary: Text
    on: tuple[str, ...] = ("*",)
    classes: tuple[str, ...] = field(default=(), name="class")
    exception: str = ""
    figure: tuple[float, float] | None = None
    is_property: bool = field(default=False, name="property")

    def __post_init__(self) -> None:
        if bool(self.exception) == (self.figure is not None):
            raise ValueError("it needs one of exception and figure: what it looks like")
        if self.figure is not None and not self.figure[0] <= self.figure[1]:
            raise ValueError("figure must be [low, high]")
        try:
            SpecifierSet(self.versions)
        except InvalidSpecifier as error:
            raise ValueError(f"versions must be such as '>=0.49.0,<=0.50.2', not '{self.versions}'") from error

    def reaches(self, environment: Environment) -> bool:
        """Whether the package's version and the processor or card are those that have it."""
        version = getattr(environment, self.package, "")
        here = {*environment.instructions.split(), environment.sm}
        fits = bool(version) and SpecifierSet(self.versions).contains(version, prereleases=True)
        return fits and (not self.classes or bool(here & set(self.classes)))

    def speaks_of(self, case: Case) -> bool:
        """Whether it is about this case."""
        named = (
            (case.metric.partition(".")[2], self.invariant),
            (case.method.partition(":")[0], self.methods),
            (case.model, self.on),
        )
        return all(any(fnmatchcase(name, pattern) for pattern in patterns) for name, patterns in named)

    def looks_like(self, row: Row) -> bool:
        """Whether the row shows exactly this."""
        if self.exception or row.detail.get("exception"):
            return bool(self.exception == row.detail.get("exception"))
        low, high = self.figure or (math.nan, math.nan)
        return row.value is not None and low <= row.value <= high

    def __str__(self) -> str:
        """'state-dict-after-forward (reference)'."""
        return f"{self.id} ({self.reference})"

    @property
    def looks(self) -> str:
        """What it looks like, in words."""
        return self.exception or (f"a figure of {self.figure[0]:g} to {self.figure[1]:g}" if self.figure else "nothing")


class Faults(Table, frozen=True):
    """The whole file."""

    schema: int
    fault: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        if len({fault.id for fault in self.fault}) < len(self.fault):
            raise ValueError("two faults have one id")


def load(folder: Path) -> tuple[Fault, ...]:
    """The faults that a baselines folder lists, then those of the package whose ids it does not take.

    BadFile, one line with the file and the entry: no TOML, an unknown key, a missing one, a newer schema.
    """
    path = folder / NAME
    own = read_toml(path, Faults).fault if path.is_file() else ()
    taken = {fault.id for fault in own}
    return own + tuple(fault for fault in read_toml(SHIPPED, Faults).fault if fault.id not in taken)


def judge(row: Row, faults: Iterable[Fault], environment: Environment) -> Row:
    """The row of an invariant with its verdict; `detail["fault"]` names a known fault that it shows."""
    if row.value is None:
        return replace(row, verdict=Verdict.MISSING)
    applying = [fault for fault in faults if fault.speaks_of(row.case) and fault.reaches(environment)]
    detail = {key: value for key, value in row.detail.items() if key != "fault"}
    seen = row.detail.get("exception") or f"{decode_number(row.value):.4g}, not {row.detail.get('limit', '')}"
    shown = next((fault for fault in applying if fault.looks_like(row)), None)
    if row.detail.get("holds"):
        gone = [fault for fault in applying if not fault.is_property]
        verdict = Verdict.BETTER if gone else Verdict.WITHIN_BOUND
        reason = f"holds: the known fault {gone[0]} is gone here, take it off {NAME}" if gone else "holds"
    elif shown is not None:
        verdict, kind = Verdict.SAME, "a stated property" if shown.is_property else "the known fault"
        detail |= {"fault": shown.id, "reference": shown.reference}
        reason = f"{kind} {shown}: {shown.summary} ({seen})"
    else:
        verdict = Verdict.OUT_OF_BOUND
        other = f"; the known fault {applying[0]} looks different: {applying[0].looks}" if applying else ""
        reason = f"does not hold: {seen}{other}"
    return replace(row, verdict=verdict, verdict_reference=verdict, reason=reason, detail=detail)


def applying(folder: Path, environment: Environment) -> list[Fault]:
    """The faults that this world has, stated properties of methods left out."""
    return [fault for fault in load(folder) if fault.reaches(environment) and not fault.is_property]
