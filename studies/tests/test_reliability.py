"""The fault campaign, one trial of some kinds: `studies/reliability/run.py` runs all of them, many times."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from studies.reliability import campaign, disturbances, scene
from studies.reliability.scene import Template

QUICK = (  # what each shows is a different part of the harness
    "a group's process is killed",
    "the controller is killed",
    "the disk under the report fills up",
    "an NLL file is damaged",
    "a measurements line is damaged",
    "two sessions share a report directory",
)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A short path: sessions put their sockets beneath it, whose names have a limit of 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def template(home: Path) -> Template:
    return scene.template(home / "cached", "cached")


@pytest.mark.parametrize("name", [*QUICK[:2], *(pytest.param(name, marks=pytest.mark.long) for name in QUICK[2:])])
def test_a_disturbed_session_loses_nothing(template: Template, home: Path, name: str) -> None:
    (fault,) = (fault for fault in disturbances.FAULTS if fault.name == name)
    trial = campaign.run(QUICK.index(name), 3, fault, template, home)
    if not trial.possible:
        pytest.skip(trial.note)
    assert not trial.wrong, f"{trial.note}, {trial.moment}"


def test_every_kind_has_its_own_name() -> None:
    names = [fault.name for fault in (*disturbances.FAULTS, *disturbances.LATER, *disturbances.SIGNALLED)]
    assert len(set(names)) == len(names)
    assert set(QUICK) <= set(names)
    drawn = campaign.order(len(disturbances.FAULTS) * 3, seed=1)
    assert all(drawn.count(fault) == 3 for fault in disturbances.FAULTS)


def test_damage_changes_bytes_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for seed in range(20):
        path.write_bytes(bytes(range(200)))
        note = disturbances.damage(path, random.Random(seed))
        data = path.read_bytes()
        if "cut" in note:
            assert data == bytes(range(len(data)))
            assert len(data) < 200
        else:
            assert sum(one != two for one, two in zip(data, range(200), strict=True)) == 1
