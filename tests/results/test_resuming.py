"""What a resumed session builds on: sound rows with their losses and environment, and nothing else."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from harness.core.environment import Environment
from harness.core.errors import HarnessError
from harness.core.files import append_line, replace_text
from harness.core.identity import identity_digest
from harness.core.records import Case, Row
from harness.core.values import encode
from harness.results import losses
from harness.results.directory import IDENTITIES, LOCK, ReportDirectory, read_report, writing

WORLD = Environment(device="cpu", cpu="some")


@pytest.fixture
def folder(tmp_path: Path) -> Path:

    ReportDirectory(tmp_path).open(keep=False)
    replace_text(tmp_path / "environments.json", json.dumps(encode({WORLD.id: WORLD.to_dict()})))
    for number in range(3):
        sha = losses.save(tmp_path / "nll", np.full(4, number, np.float32))
        case = Case("m", f"method-{number}", "t", "chunk:4", "perplexity", "cpu")
        append_line(tmp_path / "measurements.jsonl", Row.of(case, value=1.0, nll=sha, environment=WORLD.id).to_json())
    return tmp_path


def methods(folder: Path) -> list[str]:
    return [row.method for row in ReportDirectory(folder).resumable().values()]


def test_sound_rows_are_taken_without_a_word(folder: Path) -> None:
    said: list[str] = []
    assert len(ReportDirectory(folder).resumable(said.append)) == 3
    assert not said


def test_a_time_that_was_taken_beside_other_work_is_taken_again(folder: Path) -> None:
    case = Case("m", "method-1", "", "", "latency.decode", "cpu")
    beside = Row.of(case, value=2.0, environment=WORLD.id, detail={"crowded": True})
    append_line(folder / "measurements.jsonl", beside.to_json())
    assert case.id not in ReportDirectory(folder).resumable()
    quiet = Row.of(case, value=1.0, environment=WORLD.id, detail={"crowded": False})
    append_line(folder / "measurements.jsonl", quiet.to_json())
    assert ReportDirectory(folder).resumable()[case.id].value == 1.0


def test_damaged_lines_are_left_out_and_told(folder: Path) -> None:
    lines = (folder / "measurements.jsonl").read_text().splitlines()
    changed = lines[1].replace('"value": 1.0', '"value": 9.0')
    (folder / "measurements.jsonl").write_text("\n".join((lines[0], changed, lines[2][:40])))
    said: list[str] = []
    ReportDirectory(folder).resumable(said.append)
    assert methods(folder) == ["method-0"]
    assert said == ["harness: 2 damaged lines and 0 rows without their losses or environment: measured again"]


def test_rows_without_their_losses_are_left_out(folder: Path) -> None:
    first, second, _ = sorted((folder / "nll").glob("*.npz"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-9])
    assert len(methods(folder)) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "[1]", '{"x": 1}', '{"x": {"device": 3}}', "[" * 100_000])
def test_rows_without_their_environment_are_left_out(folder: Path, text: str) -> None:
    (folder / "environments.json").write_text(text)
    assert ReportDirectory(folder).known_environments() == {}
    assert methods(folder) == []


def test_an_environment_that_was_changed_is_unknown(folder: Path) -> None:
    path = folder / "environments.json"
    path.write_text(path.read_text().replace('"some"', '"other"'))
    assert ReportDirectory(folder).known_environments() == {}


def test_what_a_killed_session_left_unfinished_is_taken_away(folder: Path) -> None:
    left = [folder / ".measurements.jsonl.abcd1234", folder / ".report.md.x", folder / "nll" / f".{'0' * 64}.npz.y"]
    for path in left:
        path.touch()
    (folder / ".mine").touch()
    ReportDirectory(folder).open(keep=True)
    assert not any(path.exists() for path in left)
    assert (folder / ".mine").exists()
    assert len(methods(folder)) == 3


def test_a_directory_has_one_session_at_a_time(folder: Path) -> None:
    first, second = ReportDirectory(folder), ReportDirectory(folder)
    first.own()
    first.own()
    with pytest.raises(HarnessError, match="another session writes"):
        second.own()
    first.release()
    second.own()
    second.release()


def test_a_session_that_cannot_begin_leaves_nothing_of_its_own(folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    for place in (folder / "new", folder):
        ReportDirectory(place).release()  # never taken: nothing happens
        directory = ReportDirectory(place)
        directory.own()
        directory.release()
        other = ReportDirectory(place)
        assert place.is_dir() == (place == folder)
        other.own()  # the lock is free
        other.release()
    assert {path.name for path in folder.iterdir()} == {*before, LOCK}


def test_rows_that_come_in_are_on_the_disk_behind_their_environment(tmp_path: Path) -> None:
    directory = ReportDirectory(tmp_path)
    directory.open(keep=False)
    rows = [Row.of(Case("m", name, "", "", "memory.storage", "cpu"), value=1.0, environment=WORLD.id) for name in "ab"]
    for row in rows:
        directory.append(row, WORLD.to_dict())
    assert methods(tmp_path) == ["a", "b"]
    again = ReportDirectory(tmp_path)
    again.open(keep=True)
    again.append(rows[0], {})  # from a worker that says no environment: the known one stays
    assert methods(tmp_path) == ["a", "b"]
    again.keep(rows[1:])
    assert methods(tmp_path) == ["b"]


def test_identities_are_kept_for_the_rows_that_name_them(tmp_path: Path) -> None:
    facts = {identity_digest(one): one for one in ({"weights": "a"}, {"weights": "b"})}
    rows = [Row.of(Case("m", name, "", "", "memory.storage", "cpu"), value=1.0, identity=name) for name in facts]
    directory = ReportDirectory(tmp_path)
    directory.open(keep=False)
    directory.keep_identities({})
    assert not (tmp_path / IDENTITIES).exists()  # nothing to say
    for name in facts:
        directory.keep_identities({name: facts[name]})
    assert directory.known_identities() == facts
    again = ReportDirectory(tmp_path)
    again.open(keep=True)
    again.keep(rows)
    assert read_report(tmp_path).identities == facts
    again.keep(rows[1:])
    assert read_report(tmp_path).identities.keys() == {rows[1].identity}
    for text in ("[" * 100_000, "[]", json.dumps({"0" * 64: {"weights": "a"}}), json.dumps({"0": 1})):
        (tmp_path / IDENTITIES).write_text(text)
        assert again.known_identities() == {}


def test_what_a_disk_says_is_one_line(folder: Path) -> None:
    with (
        pytest.raises(HarnessError, match=r"cannot be written \(No space left on device\): make room"),
        writing(folder),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
