"""Report directories from strangers: read, rendered, merged, resumed."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.core.records import Row
from harness.report.document import FOLD, IN_FULL, UNFOLD, VERDICTS, markdown
from harness.report.plots import svgs
from harness.results.directory import ReportDirectory, SavedSession, read_report
from harness.run import merge as merging
from tests.fuzz.bounds import SCALE, harmless_line, quick, slow, slowest, survives
from tests.fuzz.damage import HOSTILE, altered, damaged, texts

MADE = Path(__file__).parents[1] / "report" / "data" / "made-session"
TABLES = sorted(path.name for path in MADE.iterdir() if path.suffix in (".json", ".jsonl"))
LINES = [json.loads(line) for line in (MADE / "measurements.jsonl").read_text().splitlines()]
SHARD = {"index": 1, "count": 2, "plan": "", "tests": 3, "cases": json.loads((MADE / "plan.json").read_text())}
WHOLE = [{name: value for name, value in line.items() if name != "check"} for line in LINES]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    shutil.copytree(MADE, tmp_path / "made")
    return tmp_path / "made"


def render(folder: Path) -> str:
    """The report's text."""
    return markdown(replace(read_report(folder), command=""))


@quick
@given(data=st.data())
def test_damaged_bytes(made: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(TABLES))
    (made / name).write_bytes(data.draw(damaged((MADE / name).read_bytes())))
    survives(read_report, made)
    survives(ReportDirectory(made).resumable)
    ReportDirectory(made).known_environments()
    ReportDirectory(made).known_inputs()
    shutil.copyfile(MADE / name, made / name)


@slow
@given(data=st.data())
def test_a_line_of_any_shape_is_refused_or_rendered(made: Path, data: st.DataObject) -> None:
    line = data.draw(altered(data.draw(st.sampled_from(WHOLE))))
    others = [json.dumps(other) for other in WHOLE]
    (made / "measurements.jsonl").write_text("\n".join([*others, json.dumps(line)]) + "\n")
    survives(render, made)
    survives(ReportDirectory(made).resumable)


@slow
@given(data=st.data())
def test_tables_of_any_shape_are_refused_or_rendered(made: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name in TABLES if name.endswith(".json")]))
    value = data.draw(altered(json.loads((MADE / name).read_text())))
    (made / name).write_text(json.dumps(value))
    survives(render, made)
    shutil.copyfile(MADE / name, made / name)


@slowest
@given(data=st.data())
def test_tables_of_any_shape_are_refused_or_merged(made: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(("plan.json", "environments.json", "session.json", "shard.json")))
    sound = json.loads((made / name).read_text()) if (made / name).is_file() else SHARD
    (made / name).write_text(json.dumps(data.draw(altered(sound))))
    out = made.parent / "out"
    survives(merging.merge, [made], out)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(MADE, made, dirs_exist_ok=True)
    (made / "shard.json").unlink(missing_ok=True)


def hostile(text: str) -> list[dict[str, Any]]:
    """The made session with a stranger's text in every free field."""
    free = ("model", "method", "dataset", "protocol", "reason", "protocol_id", "revision", "baseline", "token_hash")
    return [{**line, **{name: f"{line[name]}{text}" for name in free if line[name]}} for line in WHOLE]


def drawn_rows(text: str) -> list[Row]:
    return [Row.from_json(json.dumps(line)) for line in hostile(text)]


@quick
@given(text=texts.filter(str.strip))
def test_names_come_out_harmless_in_markdown(text: str) -> None:
    rows = drawn_rows(text)
    rendered = markdown(SavedSession(tuple(rows), tuple(row.case for row in rows)))
    for line in filter(str.strip, rendered.splitlines()):
        harmless_line(line)
    for own in (FOLD.format(IN_FULL), FOLD.format(VERDICTS), UNFOLD):
        rendered = rendered.replace(own, "")
    outside = re.sub(r"`[^`\n]*`", "", re.sub(r"(?m)^    .*$", "", rendered))  # neither code spans nor the command
    assert not re.search(r"(?<!\\)<[a-zA-Z/!]", outside)
    assert "](javascript" not in outside.replace("\\]", "")


@pytest.mark.parametrize("text", HOSTILE)
def test_known_tricks_come_out_harmless_in_markdown(text: str) -> None:
    test_names_come_out_harmless_in_markdown.hypothesis.inner_test(text)  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["".join(HOSTILE[2:5]), *HOSTILE[6:10:3]] if SCALE == 1 else HOSTILE)
def test_names_come_out_harmless_in_plots(text: str) -> None:
    rows = drawn_rows(text)
    for name, svg in svgs(rows, [row.case for row in rows]).items():
        assert Path(name).name == name
        assert not name.startswith(".")
        root = ElementTree.fromstring(svg)
        assert not [node for node in root.iter() if node.tag.lower().endswith(("script", "foreignobject"))]


@pytest.mark.parametrize("name", ["nll", "measurements.jsonl", "report.md", "plan.json"])
def test_what_lies_behind_a_link_is_left_alone(tmp_path: Path, name: str) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "report"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    folder.mkdir()
    (folder / name).symlink_to(outside if name == "nll" else outside / "precious")
    for keep in (False, True):
        assert survives(ReportDirectory(folder).open, keep=keep) is None
    assert (outside / "precious").read_text() == "mine"


@pytest.mark.parametrize("sha", ["../../precious", "/precious", "x" * 64])
def test_losses_are_looked_for_in_their_folder_alone(made: Path, sha: str) -> None:
    import numpy as np

    np.savez(made.parent / "precious.npz", nll=np.zeros(3, np.float32))
    line = {
        **WHOLE[0],
        "nll": sha,
        "value": 1.0,
        "environment": next(iter(ReportDirectory(made).known_environments()), ""),
    }
    (made / "measurements.jsonl").write_text(json.dumps(line) + "\n")
    assert ReportDirectory(made).resumable() == {}
