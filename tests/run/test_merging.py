"""Merging: what agrees is joined, what disagrees is refused, what never came is named."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.__main__ import main
from harness.core.errors import BadFile
from harness.core.identity import identity_digest
from harness.core.options import Shard
from harness.core.records import Case, Row, Verdict
from harness.judge.exact import hold
from harness.results import losses
from harness.results.directory import read_report
from harness.run.merge import merge, merged_command, write_shard
from harness.run.shards import partition

PLAN = [Case("m", method, "", "", metric, "cpu") for method in ("fp32", "a", "b") for metric in ("memory.storage", "x")]
PLAN_OF_ONE = [Case("m", "a", "", "", f"memory.{name}", "cpu") for name in ("parameters", "footprint", "storage")]


def a_row(case: Case, value: float | None = 1.0, **more: Any) -> Row:
    verdict = Verdict.MISSING if value is None else Verdict.SAME
    return replace(Row.of(case, value=value, unit="B", verdict=verdict, environment="e" * 12), **more)


def a_folder(
    path: Path, rows: list[Row], shard: Shard | None = None, plan: list[Case] | None = None, allowed: Sequence[str] = ()
) -> Path:
    path.mkdir(parents=True)
    (path / "measurements.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    (path / "plan.json").write_text(json.dumps([row.case.told() for row in rows]))
    (path / "environments.json").write_text(json.dumps({"e" * 12: {"torch": "2.13.0"}}))
    told = {"command": f"pytest --models m --report-dir {path.name} --shard {shard}", "notes": []}
    (path / "session.json").write_text(json.dumps(told))
    if shard:
        write_shard(path, shard, plan or PLAN, 1, allowed)
    return path


def shards(home: Path, count: int = 3) -> list[Path]:
    parts = partition(PLAN, count)
    return [
        a_folder(home / str(index), [a_row(case) for case in part], Shard(index, count))
        for index, part in enumerate(parts, 1)
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_shards_give_the_whole_in_plan_order_whatever_their_order(tmp_path: Path) -> None:
    folders = shards(tmp_path)
    merged = merge(folders, tmp_path / "out")
    assert [row.case for row in merged.rows] == PLAN
    assert merged.absent == ()
    again = merge(folders[::-1], tmp_path / "again")
    assert again.rows == merged.rows
    one, two = files(tmp_path / "out"), files(tmp_path / "again")
    told = [json.loads(files.pop("session.json")) for files in (one, two)]  # each with a digest of itself
    assert told[0]["command"].replace("/out", "/again") == told[1]["command"]
    assert told[0]["plan"] == told[1]["plan"]
    for name in ("report.md", "report.html"):
        one[name] = one[name].replace(b"/out", b"/again")
    assert one == two


def test_shards_that_never_came_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, _, third = shards(tmp_path)
    status = main(["merge", str(first), str(third), "-o", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert status == 3
    assert "shards that never came: 2" in text
    assert "missing 2: shard 2/3 never came" in text
    assert "shard 2/3 never came" in (tmp_path / "out" / "report.md").read_text()


def test_an_overlap_that_agrees_is_one_row_and_one_that_disagrees_is_refused(tmp_path: Path) -> None:
    folders = shards(tmp_path)
    rows = [a_row(case, seconds=9.0) for case in partition(PLAN, 3)[0]]
    again = a_folder(tmp_path / "again", rows, Shard(1, 3))
    assert len(merge([*folders, again], tmp_path / "out").rows) == len(PLAN)
    off = a_folder(tmp_path / "off", [replace(rows[0], value=2.0), *rows[1:]], Shard(1, 3))
    with pytest.raises(BadFile, match=r"disagree on m/.*, value: 1.0 and 2.0; leave one"):
        merge([*folders, off], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_models_were_comes_along_and_must_agree(tmp_path: Path) -> None:
    facts = {identity_digest(one): one for one in ({"weights": "a"}, {"weights": "b"})}
    names = (*facts, "")
    made = [a_folder(tmp_path / str(n), [a_row(PLAN[0], identity=name)]) for n, name in enumerate(names)]
    for folder in made[:2]:
        (folder / "identities.json").write_text(json.dumps(facts))
    merge([made[0], made[2]], tmp_path / "out")  # a report of before identities were noted agrees with any
    assert read_report(tmp_path / "out").identities == dict(list(facts.items())[:1])
    with pytest.raises(BadFile, match=r"disagree on .*, identity: "):
        merge(made[:2], tmp_path / "no")


def test_a_measurement_stands_before_a_reason(tmp_path: Path) -> None:
    folders = shards(tmp_path)
    rows = [a_row(case, None, reason="killed") for case in partition(PLAN, 3)[0]]
    broken = a_folder(tmp_path / "broken", rows, Shard(1, 3))
    for order in ([broken, *folders], [*folders, broken]):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        assert all(row.value == 1.0 for row in merge(order, out).rows)
    alone = merge([broken, *folders[1:]], tmp_path / "alone")
    assert {row.reason for row in alone.rows if row.value is None} == {"killed"}


def test_one_changed_fact_of_a_group_that_was_cut_fails_once(tmp_path: Path) -> None:
    """The case that should fail was not reached, and the others pointed to it from another shard."""
    first, _, third = (case for case in PLAN_OF_ONE)
    told = [hold(a_row(case), ["census on cpu, buffers: 0 -> 8"], "m/a.yaml", first) for case in PLAN_OF_ONE]
    one = a_folder(tmp_path / "1", [a_row(first, None, reason="killed")], Shard(1, 2), PLAN_OF_ONE)
    two = a_folder(tmp_path / "2", told[1:], Shard(2, 2), PLAN_OF_ONE)
    merged = merge([one, two], tmp_path / "out")
    assert [row.verdict for row in merged.rows] == [Verdict.MISSING, Verdict.WORSE, Verdict.SAME]
    assert merged.rows[2].case == third
    assert merged.rows[2].reason == f"exact facts changed: see {PLAN_OF_ONE[1].id}"


@pytest.mark.parametrize(
    ("written", "given", "status"),
    [
        ((), (), 1),
        ((), ("--allow-changed-input",), 0),
        (("allow_changed_input",), (), 0),
    ],
)
def test_what_every_shard_was_allowed_is_allowed_to_the_whole(
    tmp_path: Path, written: tuple[str, ...], given: tuple[str, ...], status: int
) -> None:
    changed, rest = a_row(PLAN[0], verdict=Verdict.INPUT_CHANGED), [a_row(case) for case in PLAN[1:]]
    folders = [
        a_folder(tmp_path / str(n), rows, Shard(n, 2), allowed=written) for n, rows in enumerate(([changed], rest), 1)
    ]
    assert main(["merge", *map(str, folders), "-o", str(tmp_path / "out"), *given]) == status
    strict = a_folder(tmp_path / "strict", rest, Shard(2, 2))
    assert main(["merge", str(folders[0]), str(strict), "-o", str(tmp_path / "two"), *given]) == (0 if given else 1)


def test_missing_cases_that_every_session_allowed_leave_the_whole_at_0(tmp_path: Path) -> None:
    rows = [a_row(PLAN[0], None, reason="killed")]
    one = a_folder(tmp_path / "one", rows)
    assert main(["merge", str(one), "-o", str(tmp_path / "out")]) == 3
    assert main(["merge", str(one), "-o", str(tmp_path / "given"), "--allow-missing"]) == 0
    (one / "session.json").write_text(json.dumps({"command": "pytest --models m --allow-missing"}))
    assert main(["merge", str(one), "-o", str(tmp_path / "allowed")]) == 0


def test_shards_of_another_plan_are_refused(tmp_path: Path) -> None:
    first, second, _ = shards(tmp_path)
    other = a_folder(tmp_path / "other", [a_row(PLAN[0])], Shard(3, 3), PLAN[:-1])
    with pytest.raises(BadFile, match="cut different plans"):
        merge([first, second, other], tmp_path / "out")
    plain = a_folder(tmp_path / "plain", [a_row(PLAN[0])])
    with pytest.raises(BadFile, match="is no shard"):
        merge([first, plain], tmp_path / "out")


def test_plain_sessions_merge_too(tmp_path: Path) -> None:
    one = a_folder(tmp_path / "one", [a_row(case) for case in PLAN[:3]])
    two = a_folder(tmp_path / "two", [a_row(case) for case in PLAN[2:]])
    assert [row.case for row in merge([one, two], tmp_path / "out").rows] == PLAN


def test_losses_come_along(tmp_path: Path) -> None:
    nll = np.arange(4, dtype=np.float32)
    folders = shards(tmp_path)
    sha = losses.save(folders[0] / "nll", nll)
    rows = [a_row(case, nll=sha) for case in partition(PLAN, 3)[0]]
    (folders[0] / "measurements.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    merge(folders, tmp_path / "out")
    kept = losses.load(tmp_path / "out" / "nll", sha)
    assert kept is not None
    assert kept.tolist() == nll.tolist()


def test_what_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = shards(tmp_path)
    assert main(["merge", str(folders[0]), "-o", str(folders[1])]) == 2
    assert "holds measurements already: name a new directory" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.md").write_text("mine")
    assert main(["merge", *map(str, folders), "-o", str(tmp_path / "mine")]) == 2
    assert "mine holds 'thesis.md' and no report of the harness" in capsys.readouterr().err
    (folders[0] / "shard.json").write_text("{")
    assert main(["merge", *map(str, folders), "-o", str(tmp_path / "out")]) == 2
    assert "shard.json cannot be read" in capsys.readouterr().err
    told = json.loads((folders[1] / "shard.json").read_text())
    told["cases"].pop()
    del told["check"]  # as one who edits by hand
    (folders[0] / "shard.json").write_text(json.dumps(told))
    assert main(["merge", *map(str, folders), "-o", str(tmp_path / "out")]) == 2
    assert "does not hold the plan that it names" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "command"),
    [
        ("pytest --shard 1/3 --report-dir a -q", "pytest --report-dir out -q"),
        ("pytest --shard=1/3 --report-dir=a --resume", "pytest --report-dir out"),
        ("pytest --models gpt2", "pytest --models gpt2"),
        ("", ""),
    ],
)
def test_the_command_is_that_of_one_run(told: str, command: str) -> None:
    assert merged_command([told], Path("out")) == command


def test_rows_are_merged_as_they_were_read(tmp_path: Path) -> None:
    folders = shards(tmp_path)
    path = folders[0] / "measurements.jsonl"
    path.write_text(re.sub(r', "check": "[0-9a-f]{16}"', "", path.read_text()))  # lines of older harnesses have none
    rows = {row.case: row for folder in folders for row in read_report(folder).rows}
    merge(folders, tmp_path / "out")
    assert {row.case: row for row in read_report(tmp_path / "out").rows} == rows
    assert all('"check"' in line for line in (tmp_path / "out" / "measurements.jsonl").read_text().splitlines())
    gone = merge(folders[:2], tmp_path / "gone")
    assert read_report(tmp_path / "gone").rows == gone.rows
    assert any(row.value is None for row in gone.rows)


def test_every_shard_is_held_to_the_plan_that_it_names_though_it_is_read_once(tmp_path: Path) -> None:
    folders = shards(tmp_path)
    told = json.loads((folders[2] / "shard.json").read_text())
    told["plan"] = "0" * 64
    del told["check"]
    (folders[2] / "shard.json").write_text(json.dumps(told))
    with pytest.raises(BadFile, match="does not hold the plan that it names"):
        merge(folders, tmp_path / "out")


def test_a_command_that_no_shell_reads_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folders = shards(tmp_path)
    (folders[0] / "session.json").write_text(json.dumps({"command": "pytest '--models"}))
    with pytest.raises(BadFile, match=r"the command in a session\.json is none"):
        merge(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()
