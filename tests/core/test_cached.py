"""What the cache holds is listed with its size and age, and only what lay idle goes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from harness.__main__ import main
from harness.core import cached
from harness.core.errors import HarnessError
from harness.core.files import locked, timing_lock


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    old = time.time() - 40 * cached.DAY
    for name, size, written in (
        ("checkpoints/old/model.safetensors", 3000, old),
        ("checkpoints/new/model.safetensors", 2000, None),
        ("checkpoints/new.lock", 0, None),
        ("numba/loops/one.nbi", 100, old),
        ("somebody/elses.txt", 500, old),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
        if written:
            os.utime(path, (written, written))
    return tmp_path


def test_entries_are_folders_of_known_kinds_the_largest_first(home: Path) -> None:
    found = cached.entries()
    assert [(entry.name, entry.size) for entry in found] == [
        ("checkpoints/old", 3000),
        ("checkpoints/new", 2000),
        ("numba", 100),
    ]
    assert found[0].idle_days == pytest.approx(40, abs=0.1)
    assert found[1].idle_days < 1


def test_prune_takes_what_lay_idle_and_nothing_else(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--prune", "30"]) == 0
    assert "deleted checkpoints/old: 0.0 MiB, unused for 40 days" in capsys.readouterr().out
    assert [entry.name for entry in cached.entries()] == ["checkpoints/new"]
    assert (home / "somebody" / "elses.txt").is_file()
    assert main(["cache", "--prune", "0"]) == 0
    assert cached.entries() == []


def test_nothing_goes_while_a_run_measures(home: Path) -> None:
    with locked(timing_lock(), shared=True), pytest.raises(HarnessError, match="a run measures"):
        cached.prune(0)
    assert len(cached.entries()) == 3


def test_what_is_being_made_stays(home: Path) -> None:
    (home / "checkpoints" / "old").rename(home / "checkpoints" / ".old.1234")
    (home / "environments" / "theirs").mkdir(parents=True)
    (home / "environments" / "theirs" / "python").write_bytes(b"x")
    assert [entry.name for entry in cached.entries()] == ["checkpoints/new", "numba", "environments/theirs"]
    with locked(home / "checkpoints" / "new.lock"), locked(home / "environments" / "theirs.lock"):
        assert [entry.name for entry in cached.prune(0)] == ["numba"]
    assert [entry.name for entry in cached.prune(0)] == ["checkpoints/new", "environments/theirs"]
    assert (home / "checkpoints" / ".old.1234" / "model.safetensors").is_file()


@pytest.mark.parametrize("days", ["-1", "nan"])
def test_days_that_are_none(home: Path, days: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", f"--prune={days}"]) == 2
    assert "--prune takes the days" in capsys.readouterr().err


def test_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "none"))
    assert (cached.entries(), cached.prune(0)) == ([], [])
