"""Whose a report directory is, when an earlier report goes, and that a damaged one is refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.core.environment import Environment
from harness.core.errors import BadFile, HarnessError
from harness.core.options import Shard
from harness.core.records import Case, Row
from harness.report import write
from harness.results import losses
from harness.results.directory import LOCK, ReportDirectory, read_report
from harness.run.merge import read_part, write_shard

WORLD = Environment(device="cpu", cpu="some")
CASES = [Case("m", name, "t", "chunk:4", "perplexity", "cpu") for name in ("fp32", "a")]
THEIRS = {
    "logo.svg": "logo",
    "report.md": "thesis",
    "plan.json": "{}",
    "keep.txt": "keep",
    "nll/my-data.bin": "data",
}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def row(case: Case, folder: Path, value: float | None = 1.0) -> Row:
    """A row with losses of its own, and an index of the reference's as a group's process leaves it."""
    sha = losses.save(folder / "nll", np.full(4, len(case.method) + (value or 0.0), np.float32))
    index = folder / "nll" / f"reference-{len(case.method):032x}"
    if not index.exists():
        index.write_text(sha)
    return Row.of(case, value=value, nll=sha, environment=WORLD.id)


def session(folder: Path, values: tuple[float | None, ...] = (1.0, 2.0), **options: Any) -> ReportDirectory:
    """A whole session of two cases, as it leaves the directory."""
    directory = ReportDirectory(folder)
    directory.own()
    directory.open(keep=options.get("keep", False))
    directory.keep_plan(CASES)
    rows = [row(case, folder, value) for case, value in zip(CASES, values, strict=True)]
    for one in rows:
        directory.append(one, WORLD.to_dict())
    if not directory.waits:
        directory.keep(rows)
        write(folder, rows, CASES, directory.environments, command="pytest")
    directory.release()
    return directory


@pytest.fixture(autouse=True, scope="module")
def without_plots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.report.document.svgs", lambda rows, planned: {})  # slow, and tested elsewhere
        yield


# whose it is


def test_a_folder_of_the_user_s_own_is_refused_untouched(tmp_path: Path) -> None:
    for name, text in THEIRS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = files(tmp_path)
    for take in (ReportDirectory(tmp_path).own, lambda: ReportDirectory(tmp_path).open(keep=False)):
        with pytest.raises(HarnessError, match=r"^--report-dir .* holds 'keep.txt' and no report .*: name a new or an"):
            take()
    assert files(tmp_path) == before


def test_what_the_user_put_beside_a_report_stays(tmp_path: Path) -> None:
    session(tmp_path)
    mine = {"logo.svg": "logo", "nll/my-data.bin": "data", "notes.txt": "notes"}
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "m+old.svg").write_text("a plot")
    report = tmp_path / "report.md"
    report.write_text(report.read_text() + "![old](m%2Bold.svg) ![outside](nll%2F..%2Flogo.svg)\n")
    session(tmp_path, (3.0, 4.0))
    assert {name: (tmp_path / name).read_text() for name in mine} == mine
    assert not (tmp_path / "m+old.svg").exists()


@pytest.mark.parametrize("kind", ["session", "shard of nothing", "published", "upgrade"])
def test_a_directory_of_before_folders_were_marked_is_known(tmp_path: Path, kind: str) -> None:
    if kind == "session":
        session(tmp_path)
    elif kind == "shard of nothing":
        (tmp_path / "plan.json").write_text("[]")
        write_shard(tmp_path, Shard(2, 2), CASES, 1)
    elif kind == "published":
        claim = {name: "" for name in "report model text protocol part method metric printed unit verdict note".split()}
        (tmp_path / "published.json").write_text(json.dumps({"claims": [claim]}))
    else:
        (tmp_path / "upgrade.md").write_text("# Upgrade")
        (tmp_path / "one-1").mkdir()
        (tmp_path / "one-1" / "side.json").write_text("{}")
    (tmp_path / LOCK).unlink(missing_ok=True)
    ReportDirectory(tmp_path).claim()
    assert (tmp_path / LOCK).is_file()


# an earlier report


@pytest.mark.parametrize("keep", [False, True])
def test_a_session_that_measures_nothing_leaves_an_earlier_report_to_the_byte(tmp_path: Path, keep: bool) -> None:
    session(tmp_path)
    before = files(tmp_path)
    assert session(tmp_path, (None, None), keep=keep).waits
    assert files(tmp_path) == before


def test_it_makes_a_report_where_none_was(tmp_path: Path) -> None:
    assert not session(tmp_path / "new", (None, None)).waits
    assert [one.value for one in read_report(tmp_path / "new").rows] == [None, None]


def test_the_first_figure_takes_an_earlier_report_s_place(tmp_path: Path) -> None:
    session(tmp_path)
    old = {path.name for path in (tmp_path / "nll").glob("*.npz")}
    directory = ReportDirectory(tmp_path)
    directory.own()
    directory.open(keep=False)
    directory.keep_plan([CASES[0], CASES[1]._replace(method="b")])
    assert not list((tmp_path / "nll").glob("reference-*"))  # each session computes its own
    directory.append(Row.of(CASES[0], reason="gone"), {})
    assert len(read_report(tmp_path).rows) == 2
    directory.append(row(CASES[1], tmp_path, 9.0), WORLD.to_dict())
    found = read_report(tmp_path)
    assert [one.value for one in found.rows] == [None, 9.0]
    assert [case.method for case in found.planned] == ["fp32", "b"]
    assert not (tmp_path / "report.md").exists()
    directory.keep(found.rows)
    kept = {path.name for path in (tmp_path / "nll").glob("*.npz")}
    assert kept == {f"{found.rows[1].nll}.npz"}
    assert not kept & old
    directory.release()


def test_a_session_killed_before_its_first_figure_costs_an_earlier_report_nothing(tmp_path: Path) -> None:
    session(tmp_path)
    before = files(tmp_path)
    killed = ReportDirectory(tmp_path)
    killed.open(keep=False)
    killed.keep_inputs({"weights of m": "a"})
    assert read_report(tmp_path).rows
    session(tmp_path, (None, None))
    assert files(tmp_path) == before


def test_a_resumed_session_keeps_the_measurements_that_it_goes_on_from(tmp_path: Path) -> None:
    session(tmp_path)
    directory = ReportDirectory(tmp_path)
    directory.open(keep=True)
    assert list((tmp_path / "nll").glob("reference-*"))
    directory.append(row(CASES[1], tmp_path, 3.0), WORLD.to_dict())
    assert [one.value for one in read_report(tmp_path).rows] == [1.0, 2.0, 3.0]


# a damaged one


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    session(folder)
    write_shard(folder, Shard(1, 2), CASES, 7)
    return folder


def outcome(read: Callable[[Path], Any], path: Path) -> Any:
    """What a reader gives, or the one line that it refuses with."""
    try:
        return read(path)
    except BadFile as error:
        return str(error)


def told(folder: Path) -> tuple[Any, ...]:
    part = read_part(folder)
    facts = part.session
    return facts.rows, facts.planned, facts.environments, facts.command, facts.notes, part.shard, part.whole, part.tests


@pytest.mark.parametrize("name", ["plan.json", "environments.json", "session.json", "shard.json"])
def test_a_flipped_bit_is_found_and_another_layout_is_none(made: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    path, sound = folder / name, told(made)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7, sort_keys=True))
    assert told(folder) == sound
    data, draw = (made / name).read_bytes(), random.Random(0)
    for _ in range(100):
        at, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        found = outcome(told, folder)
        assert found == sound or (name in str(found) and "\n" not in str(found)), (at, bit)


def test_reports_of_before_digests_were_kept_are_read(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    (folder / "session.json").write_text(json.dumps({"command": "pytest", "notes": []}))
    shard = json.loads((folder / "shard.json").read_text())
    (folder / "shard.json").write_text(json.dumps({name: value for name, value in shard.items() if name != "check"}))
    assert told(folder) == told(made)
