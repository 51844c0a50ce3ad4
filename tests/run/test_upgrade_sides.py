"""What a side is, which environment it gets, and what is said of one that cannot be had."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import BadSpecification, HarnessError, MissingAsset
from harness.core.options import Declared, Options
from harness.run.upgrade import driver
from harness.run.upgrade.driver import parse, parse_all, reason_of
from harness.run.upgrade.process import Remote, SideGone


def test_a_release() -> None:
    side = parse("BitsAndBytes==0.48.2")
    assert (side.label, side.distribution, side.slug) == (
        "bitsandbytes==0.48.2",
        "bitsandbytes",
        "bitsandbytes-0.48.2",
    )


def test_a_wheel_and_a_directory_are_told_apart_by_content(tmp_path: Path) -> None:
    slugs = []
    for content in ("one", "two"):
        wheel = tmp_path / "bitsandbytes-0.50.2+x-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("bitsandbytes/__init__.py", content)
        slugs.append(parse(str(wheel)).slug)
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / "pyproject.toml").write_text('[project]\nname = "Bits_And-Bytes"\n')
        (tmp_path / "source" / "code.py").write_text(content)
        (tmp_path / "source" / "build").mkdir(exist_ok=True)
        side = parse(str(tmp_path / "source"))
        assert side.distribution == "bits-and-bytes"
        slugs.append(side.slug)
    assert len(set(slugs)) == 4
    (tmp_path / "source" / "build" / "left").write_text("what a build leaves is not its content")
    assert parse(str(tmp_path / "source")).slug == slugs[3]


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("bitsandbytes", BadSpecification, "write bitsandbytes==VERSION"),
        ("bitsandbytes>=0.48", BadSpecification, "write bitsandbytes==VERSION"),
        ("bitsandbytes==0.48.*", BadSpecification, "write bitsandbytes==VERSION"),
        ("bits and bytes", BadSpecification, "write NAME==VERSION"),
        ("gone-1.0-py3-none-any.whl", MissingAsset, "is not there"),
        ("gone/folder", MissingAsset, "is not there"),
    ],
)
def test_bad_sides_are_one_line(text: str, error: type[HarnessError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_sides_must_differ_in_one_package() -> None:
    with pytest.raises(BadSpecification, match="two sides or more"):
        parse_all(["torch==2.13.0"])
    with pytest.raises(BadSpecification, match="are the same"):
        parse_all(["torch==2.13.0", "torch==2.13.0"])
    with pytest.raises(BadSpecification, match="bitsandbytes and torch"):
        parse_all(["torch==2.13.0", "bitsandbytes==0.50.2"])


CONFLICT = """INFO: pip is looking at multiple versions
The conflict is caused by:
    transformers 5.13.0 depends on huggingface-hub<2.0 and >=1.5
    The user requested (constraint) huggingface-hub==2.4.0

To fix this you could try to:
ERROR: Cannot install transformers==5.13.0 because these package versions have conflicting dependencies.
ERROR: ResolutionImpossible: for help visit somewhere
"""
ABSENT = """ERROR: Could not find a version that satisfies the requirement bitsandbytes==9.9 (from versions: 0.1, 0.2)
ERROR: No matching distribution found for bitsandbytes==9.9
"""


def test_pips_reason_in_a_line() -> None:
    assert reason_of(ABSENT) == "No matching distribution found for bitsandbytes==9.9"
    assert reason_of(CONFLICT) == (
        "it conflicts with the lock: transformers 5.13.0 depends on huggingface-hub<2.0 and >=1.5; "
        "The user requested (constraint) huggingface-hub==2.4.0"
    )
    assert reason_of("") == "pip said nothing"


class Pip:
    """In pip's place: what it was told, and what it answers."""

    def __init__(self, status: int = 0, said: str = "") -> None:
        self.status, self.said, self.runs = status, said, 0
        self.lock: list[str] = []

    def __call__(self, command: list[str], *, env: dict[str, str], **_: Any) -> Any:
        self.runs += 1
        self.lock = Path(env["PIP_CONSTRAINT"]).read_text().splitlines()
        return subprocess.CompletedProcess(command, self.status, "", self.said)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pip:
    found = Pip()
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    monkeypatch.setattr("harness.run.upgrade.driver.subprocess.run", found)

    def create(folder: Path, **_: Any) -> None:
        (folder / "lib" / "python3" / "site-packages").mkdir(parents=True)

    monkeypatch.setattr("harness.run.upgrade.driver.venv.create", create)
    return found


def test_an_environment_is_built_once_with_all_else_held(pip: Pip, tmp_path: Path) -> None:
    side = parse("bitsandbytes==0.48.2")
    said: list[str] = []
    first, second = driver.build(side, said.append), driver.build(side, said.append)
    assert (pip.runs, first, len(said)) == (1, second, 1)
    held = dict(line.split("==") for line in pip.lock)
    assert "bitsandbytes" not in held
    assert held["pytest"] == first[1]["pytest"]
    assert driver.build(parse("bitsandbytes==0.49.2"), said.append)[0] != first[0]


def test_a_failed_build_leaves_nothing(pip: Pip, tmp_path: Path) -> None:
    pip.status, pip.said = 1, ABSENT
    with pytest.raises(HarnessError, match=r"bitsandbytes==9\.9 cannot be installed: No matching"):
        driver.build(parse("bitsandbytes==9.9"), print)
    assert not [path for path in (tmp_path / "environments").iterdir() if path.is_dir()]


def test_what_a_side_said_stays_when_the_next_round_begins(tmp_path: Path) -> None:
    """`echo` in Python's place: it says its arguments, and ends."""
    log = tmp_path / "side.log"
    for number in (1, 2):
        remote = Remote(Path("/bin/echo"), Options(Declared(tmp_path)), 1, log)
        with pytest.raises(SideGone, match=r"exit status 0 \(-m harness.run.upgrade.process"):
            remote.ask("prepare", ())
        remote.close()
        assert log.read_text().count("-m harness.run.upgrade.process") == number


def test_an_interrupted_build_is_made_anew(pip: Pip) -> None:
    side = parse("bitsandbytes==0.48.2")
    python, _ = driver.build(side, print)
    (python.parents[1] / driver.RECORD).unlink()
    driver.build(side, print)
    assert pip.runs == 2
