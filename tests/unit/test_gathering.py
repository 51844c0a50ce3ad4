"""Report directories read side by side give what they give one by one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from harness import gathering, merging
from harness.errors import BadFile
from harness.records import Row, Verdict
from harness.sharding import partition
from tests.unit.test_merging import PLAN, a_folder, a_row, files, shards


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little there is, on three processors."""
    monkeypatch.setattr(gathering, "LEAST", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})


def die(path: Path) -> None:
    """What a killed process does; the second time it ends well."""
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_even_and_nothing_is_left_out(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {Path(str(place)): 10 + place for place in range(4)}
    assert gathering.dealt(sizes, count) == [list(sizes)]  # too little to be worth a process
    monkeypatch.setattr(gathering, "LEAST", 0)
    shares = gathering.dealt(sizes, count)
    assert sorted(path for share in shares for path in share) == list(sizes)
    assert len(shares) == min(count, 4)
    if count == 2:
        assert [sum(map(sizes.__getitem__, share)) for share in shares] == [23, 23]


def test_a_merge_side_by_side_equals_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = shards(tmp_path)
    one = merging.merge(parts, tmp_path / "one")
    monkeypatch.setattr(gathering, "LEAST", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    two = merging.merge(parts, tmp_path / "two")
    assert one.rows == two.rows
    kept = ("measurements.jsonl", "plan.json", "environments.json")
    first, second = files(tmp_path / "one"), files(tmp_path / "two")
    assert [first[name] for name in kept] == [second[name] for name in kept]


def test_losses_come_along_from_another_process(tmp_path: Path, apart: None) -> None:
    for place, part in enumerate(partition(PLAN, 2)):
        folder = a_folder(tmp_path / str(place), [a_row(case, nll=f"{place}" * 64) for case in part], None, list(part))
        (folder / "nll").mkdir()
        (folder / "nll" / f"{f'{place}' * 64}.npz").write_bytes(b"losses")
    merging.merge([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert sorted(path.name[0] for path in (tmp_path / "out" / "nll").iterdir()) == ["0", "1"]


def test_what_a_folder_has_wrong_comes_back_from_another_process(tmp_path: Path, apart: None) -> None:
    parts = shards(tmp_path)
    (parts[-1] / "measurements.jsonl").write_text("nonsense\n")
    with pytest.raises(BadFile, match="is no measurement"):
        merging.merge(parts, tmp_path / "out")
    assert not (tmp_path / "out" / "measurements.jsonl").exists()


def test_what_a_killed_process_had_is_done_here(tmp_path: Path, apart: None) -> None:
    rows = [Row.of(case, verdict=Verdict.SAME, value=1.0) for case in PLAN]
    folders = [a_folder(tmp_path / name, rows, None, list(PLAN)) for name in "ab"]
    with gathering.readers(folders) as readers:
        assert readers.pool
        readers.beside(die, tmp_path / "died")()
        assert (tmp_path / "died").exists()
        readers.beside(Path.touch, tmp_path / "later")()
        assert (tmp_path / "later").exists()
        assert [read().rows for read in readers.sessions.values()] == [tuple(rows)] * 2
