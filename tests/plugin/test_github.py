"""What a session tells a GitHub workflow: annotations that nothing in a reason can end, a summary that fits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness.core.errors import HarnessError
from harness.core.records import Case, Row, Verdict
from harness.plugin import github
from tests.report.test_report import MADE


def failed(count: int, reason: str = "it grew") -> list[Row]:
    cases = (Case("m", f"method-{place}", "", "", "memory.storage", "cpu") for place in range(count))
    return [Row.of(case, value=1.0, unit="B", verdict=Verdict.WORSE, reason=reason) for case in cases]


def test_an_annotation_names_the_case_and_its_command_and_nothing_ends_it() -> None:
    (line,) = github.errors(failed(1, "100% more\r\n::set-output name=x::y\x1b[2J"))
    title = "m/method-0/memory.storage/cpu%3A worse"
    assert line.startswith(f"::error title={title}::100%25 more")
    assert line.endswith("-k m/method-0/memory.storage/cpu")
    assert "%0Ameasure again: pytest --pyargs harness.cases " in line
    assert not set("\r\n\x1b") & set(line)


@pytest.mark.parametrize(("count", "last"), [(10, "method-9"), (11, "2 more cases fail")])
def test_no_more_annotations_than_are_shown(count: int, last: str) -> None:
    lines = github.errors(failed(count))
    assert len(lines) == 10
    assert last in lines[-1]


def test_a_summary_is_appended_and_a_large_one_is_cut_to_its_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(MADE, tmp_path / "made")
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    github.append(summary, tmp_path / "made" / "report.md")
    whole = summary.read_text()
    assert whole.startswith("before\n# Quantization report\n\n**Harm: ")
    assert "| `absmax-int8`" in whole
    assert "![" not in whole  # a summary shows no file of the runner's disk
    monkeypatch.setattr(github, "ROOM", 100)
    github.append(summary, tmp_path / "made" / "report.md")
    rest = summary.read_text().removeprefix(whole)
    assert rest.startswith("# Quantization report\n\n**Harm: ")
    assert "keep the report directory as an artifact" in rest
    assert "| `absmax-int8`" not in rest
    with pytest.raises(HarnessError, match=r"GITHUB_STEP_SUMMARY .* cannot be written"):
        github.append(tmp_path / "nowhere" / "summary.md", tmp_path / "made" / "report.md")


def test_it_is_silent_elsewhere() -> None:
    assert not github.wanted({})
    assert not github.wanted({"GITHUB_ACTIONS": "false", "GITHUB_STEP_SUMMARY": ""})
    assert github.wanted({"GITHUB_ACTIONS": "true"})
