"""What pyproject.toml promises: every dependency is locked, and its lowest version is the one that is run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from harness import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUN = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["fast"]]


def pins(name: str) -> dict[str, Version]:
    """What a file of constraints pins, by normalized name."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = (re.split("==", line) for line in lines if line and not line.startswith("#"))
    return {part[0].lower().replace("_", "-"): Version(part[1]) for part in found}


def lower(requirement: str) -> tuple[str, Version]:
    read = Requirement(requirement)
    (bound,) = read.specifier
    assert bound.operator == ">=", requirement
    return read.name.lower().replace("_", "-"), Version(bound.version)


def test_every_dependency_is_locked_at_or_above_its_bound() -> None:
    locked = pins("constraints.txt")
    for name, bound in map(lower, RUN):
        assert locked[name] >= bound
    assert {Requirement(item).name.lower() for item in PROJECT["optional-dependencies"]["dev"]} <= locked.keys()


def test_the_lowest_environment_holds_the_lowest_versions() -> None:
    lowest = pins("lowest.txt")
    assert {name: lowest.get(name) for name, _ in map(lower, RUN)} == dict(map(lower, RUN))


def test_the_citation_names_this_version() -> None:
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
