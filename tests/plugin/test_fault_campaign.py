"""The fault campaign, one trial of some kinds: `benchmarks/faults/run.py` runs all of them, many times."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FAULTS = Path(__file__).parents[2] / "benchmarks" / "faults"
QUICK = (  # what each shows is a different part of the harness
    "a group's process is killed",
    "the controller is killed",
    "the disk under the report fills up",
    "an NLL file is damaged",
    "a measurements line is damaged",
    "two sessions share a report directory",
)


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, Any]]:
    sys.path.insert(0, str(FAULTS))
    try:
        yield {name: importlib.import_module(name) for name in ("acts", "campaign", "scene")}
    finally:
        sys.path.remove(str(FAULTS))


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A short path: sessions put their sockets beneath it, whose names have a limit of 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def template(parts: dict[str, Any], home: Path) -> Any:
    return parts["scene"].template(home / "cached", "cached")


@pytest.mark.parametrize("name", [*QUICK[:2], *(pytest.param(name, marks=pytest.mark.long) for name in QUICK[2:])])
def test_a_disturbed_session_loses_nothing(parts: dict[str, Any], template: Any, home: Path, name: str) -> None:
    (fault,) = (fault for fault in parts["acts"].FAULTS if fault.name == name)
    trial = parts["campaign"].run(QUICK.index(name), 3, fault, template, home)
    if not trial.possible:
        pytest.skip(trial.note)
    assert not trial.wrong, f"{trial.note}, {trial.moment}"


def test_every_kind_has_its_own_name(parts: dict[str, Any]) -> None:
    names = [fault.name for fault in parts["acts"].FAULTS]
    assert len(set(names)) == len(names)
    assert set(QUICK) <= set(names)
    drawn = parts["campaign"].order(len(names) * 3, seed=1)
    assert all(drawn.count(fault) == 3 for fault in parts["acts"].FAULTS)


def test_damage_changes_bytes_and_nothing_else(parts: dict[str, Any], tmp_path: Path) -> None:
    import random

    path = tmp_path / "x"
    for seed in range(20):
        path.write_bytes(bytes(range(200)))
        note = parts["acts"].damage(path, random.Random(seed))
        data = path.read_bytes()
        if "cut" in note:
            assert data == bytes(range(len(data)))
            assert len(data) < 200
        else:
            assert sum(one != two for one, two in zip(data, range(200), strict=True)) == 1
