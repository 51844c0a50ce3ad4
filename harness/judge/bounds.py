"""Tolerable losses and noise floors, each with its reason: the package's bounds.toml, then the user's over it."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from harness.core.errors import BadFile
from harness.core.records import SCHEMA, Case

DEFAULTS = Path(__file__).with_name("bounds.toml")
NAME = "bounds.toml"
TABLES = ("reference", "record", "floor")
PATTERNS = ("models", "methods", "metrics", "devices")
LIMITS = ("ratio", "at_most", "at_least")
ALLOWED = {"reference": LIMITS, "record": ("ratio",), "floor": ("at_most",)}


@dataclass(frozen=True)
class Rule:
    """One limit, the cases that it speaks of, and why."""

    kind: str  # 'ratio', 'at_most' or 'at_least'
    value: float
    reason: str
    patterns: tuple[tuple[str, tuple[str, ...]], ...] = ()  # ('metrics', ('latency.*',)); () of a kind meets all

    @property
    def limit(self) -> float:
        """The limit in the figure's unit: the logarithm of a ratio, in nats."""
        return math.log(self.value) if self.kind == "ratio" else self.value

    def meets(self, case: Case) -> bool:
        """Whether every kind of pattern given has one that matches the case."""
        names = {
            "models": (case.model,),
            "methods": (case.method, case.method.partition(":")[0]),
            "metrics": (case.metric,),
            "devices": (case.device,),
        }
        return all(
            any(fnmatchcase(name, pattern) for name in names[kind] for pattern in patterns)
            for kind, patterns in self.patterns
        )

    def __str__(self) -> str:
        """'at most 0.5%', 'at most 0.01', 'at least 0.9'."""
        if self.kind == "ratio":
            return f"at most {100 * (self.value - 1):.3g}%"
        return f"{self.kind.replace('_', ' ')} {self.value:g}"


@dataclass(frozen=True)
class Bounds:
    """Every rule by its table, in order: the last that matches a case holds."""

    rules: dict[str, tuple[Rule, ...]] = field(default_factory=dict)

    def _last(self, table: str, case: Case) -> Rule | None:
        return next((rule for rule in reversed(self.rules.get(table, ())) if rule.meets(case)), None)

    def against_reference(self, case: Case) -> Rule | None:
        """The tolerable loss against the reference; None where nothing is promised."""
        return self._last("reference", case)

    def allowance(self, case: Case) -> float:
        """The ratio to the recorded value up to which a figure is not worse; 1.0 where no rule speaks."""
        rule = self._last("record", case)
        return rule.value if rule else 1.0

    def floor(self, case: Case) -> float:
        """The change below which there is only noise, in the figure's unit; 0.0 where no rule speaks."""
        rule = self._last("floor", case)
        return rule.value if rule else 0.0


def load(folder: Path) -> Bounds:
    """The package's rules, then those of `folder`/bounds.toml where there is one.

    BadFile, one line with the file and what to write instead: no TOML, an unknown table or key, a newer schema,
    a value of the wrong kind, a rule without a reason.
    """
    files = [DEFAULTS] + ([folder / NAME] if (folder / NAME).exists() else [])
    parts = [read(path) for path in files]
    return Bounds({table: tuple(rule for part in parts for rule in part.get(table, ())) for table in TABLES})


def read(path: Path) -> dict[str, tuple[Rule, ...]]:
    """One file's rules by table."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise BadFile(f"{path} cannot be read as TOML: {error}") from error
    schema = data.pop("schema", None)
    if type(schema) is not int:
        raise BadFile(f"{path} has no schema number: begin it with 'schema = {SCHEMA}'")
    if schema > SCHEMA:
        raise BadFile(f"{path} has schema {schema}, newer than this harness reads ({SCHEMA}): upgrade the harness")
    for table, entries in data.items():
        if table not in TABLES:
            raise BadFile(f"{path} has no place for '{table}' (known: {', '.join(TABLES)})")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise BadFile(f"{path}: write a rule as [[{table}]], in double brackets")
    return {
        table: tuple(_rule(f"{path}: [[{table}]] {number}", table, entry) for number, entry in enumerate(entries, 1))
        for table, entries in data.items()
    }


def _rule(where: str, table: str, entry: dict[str, Any]) -> Rule:
    known = (*PATTERNS, *ALLOWED[table], "reason")
    for key in entry:
        if key not in known:
            raise BadFile(f"{where} has no place for '{key}' (known: {', '.join(known)})")
    kinds = [key for key in ALLOWED[table] if key in entry]
    if len(kinds) != 1:
        raise BadFile(f"{where} needs one of {', '.join(ALLOWED[table])}")
    reason = entry.get("reason")
    if not isinstance(reason, str) or not reason.strip():
        raise BadFile(f"{where} gives no reason: a limit without one cannot be reviewed")
    for key in PATTERNS:
        patterns = entry.get(key, ["*"])
        if not isinstance(patterns, list) or not patterns or not all(isinstance(item, str) for item in patterns):
            raise BadFile(f'{where}: {key} must be a list of patterns, such as {key} = ["*"]')
    return Rule(
        kinds[0],
        _number(where, kinds[0], entry[kinds[0]]),
        reason,
        tuple((key, tuple(entry[key])) for key in PATTERNS if key in entry),
    )


def _number(where: str, kind: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadFile(f"{where}: {kind} must be a finite number, not {value!r}")
    if kind == "ratio" and value < 1:
        raise BadFile(f"{where}: ratio must be 1 or more, not {value}: it says how many times the figure may be")
    return float(value)
