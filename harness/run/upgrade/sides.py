"""What stands on one side of an upgrade (a release, a wheel, a source directory), and its environment. No torch.

An environment is built once and kept in the cache: a virtual environment of its own whose import path goes on, behind
its own packages, to those of the environment that runs this command. pip installs the named package into it with
everything else held at the version that is installed here, so that only that package (and what it needs and nobody
had) differs, and torch lies on the disk once. Nothing is taken from this environment but its packages: no startup hook
of it is run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from harness.core.errors import BadSpecification, HarnessError, MissingAsset
from harness.core.files import cache_dir, locked, replace_text, sha256_file
from harness.core.values import digest

BUILT = {"build", "dist", "__pycache__", "node_modules", "venv"}  # of a source directory, never part of its content
FORMAT = 1  # of a built environment: raise it when they are built in another way
RECORD = "harness.json"  # written last: an environment without it was not finished
NOT_PINNED = {"pip", "setuptools", "wheel", "llm-quantization-harness"}  # the installers, and this code itself
REASON_CHARACTERS = 300  # of pip's own words in one line


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


class Unbuilt(HarnessError):
    """A side whose environment cannot be built; one line."""


@dataclass(frozen=True)
class Built:
    """A side's environment: its interpreter, and the packages that it sees, by canonical name."""

    python: Path
    packages: Mapping[str, str]


def package_folders() -> list[str]:
    """Where the running environment's packages lie, in the order in which they are imported."""
    paths = sysconfig.get_paths()
    named = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return [folder for folder in dict.fromkeys([paths["purelib"], paths["platlib"], *named]) if Path(folder).is_dir()]


def installed(folders: Sequence[str]) -> dict[str, str]:
    """Distributions by canonical name with their versions; of two of one name the first on the path."""
    versions: dict[str, str] = {}
    for distribution in distributions(path=list(folders)):
        name = distribution.metadata["Name"]
        if name:
            versions.setdefault(canonicalize_name(name), distribution.version)
    return dict(sorted(versions.items()))


def build(side: Side, say: Callable[[str], None]) -> Built:
    """The side's environment, built where it is not there yet; Unbuilt where pip will not."""
    folders = package_folders()
    lock = {name: version for name, version in installed(folders).items() if name not in NOT_PINNED}
    lock.pop(side.distribution, None)
    facts = {"format": FORMAT, "side": side.content, "lock": lock, "folders": folders, "python": sys.version}
    home = cache_dir() / "environments"
    folder = home / f"{side.slug}-{digest(facts)[:16]}"
    with locked(home / f"{folder.name}.lock"):
        if not (folder / RECORD).is_file():
            say(f"building an environment for {side.label}")
            _build(side, folder, folders, lock)
    packages = json.loads((folder / RECORD).read_text(encoding="utf-8"))["packages"]
    return Built(_python(folder), packages)


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _own_packages(folder: Path) -> Path:
    version = ".".join(platform.python_version_tuple()[:2])
    return folder / "lib" / f"python{version}" / "site-packages"


def _build(side: Side, folder: Path, folders: Sequence[str], lock: Mapping[str, str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # a build that was interrupted
    try:
        venv.create(folder, with_pip=True, symlinks=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unbuilt(f"no environment could be made in {folder}: {error}") from error
    own = _own_packages(folder)
    (own / "behind.pth").write_text("".join(f"{path}\n" for path in folders), encoding="utf-8")
    constraints = folder / "lock.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in lock.items()), encoding="utf-8")
    # the environment variable takes the place of a constraint of the user's, which would hold the package itself
    variables = {**os.environ, "PIP_CONSTRAINT": str(constraints)}
    variables.pop("PYTHONPATH", None)
    command = [str(_python(folder)), "-m", "pip", "install", "--no-input", side.install]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        raise Unbuilt(f"{side.label} cannot be installed: {reason_of(done.stdout + done.stderr)}")
    facts = {"label": side.label, "install": side.install, "packages": installed([str(own), *folders])}
    replace_text(folder / RECORD, json.dumps(facts, indent=1) + "\n")


def reason_of(output: str) -> str:
    """Why pip did not install, in one line: the conflict it names, else its first error."""
    lines = [re.sub(r"\s+", " ", line).strip() for line in output.splitlines()]
    if "The conflict is caused by:" in lines:
        start = lines.index("The conflict is caused by:") + 1
        conflict = itertools.takewhile(bool, lines[start:])
        return ("it conflicts with the lock: " + "; ".join(conflict))[:REASON_CHARACTERS]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    error = next((line for line in errors if line.startswith("No matching distribution")), "") or " ".join(errors[:1])
    return (error or " ".join(lines[-1:]) or "pip said nothing")[:REASON_CHARACTERS]
