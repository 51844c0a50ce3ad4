"""What stands on one side of an upgrade: a release, a wheel or a source directory of one distribution. No torch."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from harness.core.errors import BadSpecification, MissingAsset
from harness.core.files import sha256_file
from harness.core.values import digest

BUILT = {"build", "dist", "__pycache__", "node_modules", "venv"}  # of a source directory, never part of its content


@dataclass(frozen=True)
class Side:
    """One side."""

    label: str  # 'bitsandbytes==0.50.2', or the file's name
    distribution: str  # canonical name
    install: str  # what pip is given
    content: str  # digest of what is installed

    @property
    def slug(self) -> str:
        """A folder's name: the label with whatever is special replaced, and what tells equal labels apart."""
        plain = re.sub(r"[^A-Za-z0-9.]+", "-", self.label).strip("-")
        return plain if "==" in self.label else f"{plain}-{self.content[:8]}"


def parse(text: str) -> Side:
    """Read NAME==VERSION, a path of a wheel, or a path of a directory with a pyproject.toml.

    Raises:
        BadSpecification: anything else; a requirement without one exact version says nothing to measure.
        MissingAsset: a path that is not there.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return _directory(path.resolve())
    if text.endswith(".whl"):
        return _wheel(path.resolve())
    if "/" in text:
        raise MissingAsset(f"{text} is not there: name a wheel, a source directory or NAME==VERSION")
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        raise BadSpecification(f"'{text}' is no side: write NAME==VERSION, a wheel or a source directory") from error
    exact = [item for item in requirement.specifier if item.operator == "==" and "*" not in item.version]
    if len(exact) != 1 or len(requirement.specifier) != 1 or requirement.url or requirement.marker:
        raise BadSpecification(f"'{text}' names no one version: write {requirement.name}==VERSION")
    name = canonicalize_name(requirement.name)
    return Side(f"{name}=={exact[0].version}", name, str(requirement), digest(str(requirement)))


def parse_all(texts: Sequence[str]) -> tuple[Side, ...]:
    """Two or more different sides of one distribution, BadSpecification otherwise."""
    sides = tuple(parse(text) for text in texts)
    if len(sides) < 2:
        raise BadSpecification("an upgrade has two sides or more: name what you have, then what you would move to")
    names = sorted({side.distribution for side in sides})
    if len(names) > 1:
        raise BadSpecification(f"the sides name {' and '.join(names)}: all but one package must be equal")
    if len({side.slug for side in sides}) < len(sides):
        raise BadSpecification("two sides are the same: nothing would move")
    return sides


def _wheel(path: Path) -> Side:
    if not path.is_file():
        raise MissingAsset(f"{path} is not there: name a wheel, a source directory or NAME==VERSION")
    try:
        name, _, _, _ = parse_wheel_filename(path.name)
    except InvalidWheelFilename as error:
        raise BadSpecification(f"{path.name} is no wheel's file name ({error})") from error
    return Side(path.name, name, str(path), sha256_file(path))


def _directory(path: Path) -> Side:
    project = path / "pyproject.toml"
    try:
        name = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["name"]
    except (OSError, ValueError, KeyError) as error:
        raise BadSpecification(f"{path} has no pyproject.toml that names its project: build a wheel of it") from error
    content = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        if file.is_file() and not any(part in BUILT or part.startswith(".") for part in parts):
            content.update("/".join(parts).encode() + b"\0" + sha256_file(file).encode())
    return Side(path.name, canonicalize_name(str(name)), str(path), content.hexdigest())
