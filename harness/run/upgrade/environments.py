"""One environment a side, built once and kept in the cache: the running one with a single package in front. No torch.

A side's environment is a virtual environment of its own whose import path goes on, behind its own packages, to those
of the environment that runs this command. pip installs the named package into it with everything else held at the
version that is installed here, so that only that package (and what it needs and nobody had) differs, and torch lies
on the disk once. Nothing is taken from this environment but its packages: no startup hook of it is run.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from packaging.utils import canonicalize_name

from harness.core.errors import HarnessError
from harness.core.files import cache_dir, locked, replace_text
from harness.core.values import digest
from harness.run.upgrade.sides import Side

FORMAT = 1  # of a built environment: raise it when they are built in another way
RECORD = "harness.json"  # written last: an environment without it was not finished
NOT_PINNED = {"pip", "setuptools", "wheel", "llm-quantization-harness"}  # the installers, and this code itself
REASON_CHARACTERS = 300  # of pip's own words in one line


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
    found: dict[str, str] = {}
    for distribution in distributions(path=list(folders)):
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(canonicalize_name(name), distribution.version)
    return dict(sorted(found.items()))


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
    found = next((line for line in errors if line.startswith("No matching distribution")), "") or " ".join(errors[:1])
    return (found or " ".join(lines[-1:]) or "pip said nothing")[:REASON_CHARACTERS]
