"""Sessions that are disturbed on purpose, each at one known place (`test_fault_campaign.py` draws the places)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.results.directory import INPUTS, ReportDirectory

if TYPE_CHECKING:
    from tests.plugin.conftest import Project

WANTED = ("--methods", "absmax-int8", "--metrics", "memory.storage,perplexity")
FULL = """
import errno
from harness.results import directory

def full(path, line, kept=directory.append_line):
    if path.read_text().count("\\n") >= 2 if path.is_file() else False:
        raise OSError(errno.ENOSPC, "No space left on device")
    kept(path, line)

directory.append_line = full
"""
CHANGED = """
from pathlib import Path

def pytest_runtest_logreport(report):
    if report.when == "call" and "fp32" in report.nodeid and "perplexity" in report.nodeid:
        Path("text.txt").write_text(" ".join(sorted(Path("text.txt").read_text().split())))
"""


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.long)])
def test_a_full_disk_ends_the_session_in_one_line(project: Project, workers: str) -> None:
    project.write("conftest.py", FULL)
    result = project.run(*WANTED, "-n", workers)
    assert result.ret == 1
    result.stdout.no_fnmatch_line("*INTERNALERROR*")
    result.stdout.fnmatch_lines(["*cannot be written (No space left on device): make room*--resume*"])
    kept = [row for row in project.rows() if row["value"] is not None]
    project.write("conftest.py", "")
    assert project.run(*WANTED, "--resume").ret == 0
    rows = project.rows()
    assert all(row["value"] is not None for row in rows)
    assert all(row in rows for row in kept)


def test_a_report_directory_in_use_is_refused(project: Project) -> None:
    other = ReportDirectory(project.path / "harness-report")
    other.own()
    result = project.look(*WANTED)
    assert result.ret == 4
    result.stderr.fnmatch_lines(["ERROR: another session writes --report-dir *"])
    other.release()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_text_that_changes_is_refused_by_name(project: Project, workers: str) -> None:
    from harness.inputs.texts import synthetic

    project.write("text.txt", synthetic.text(1200, 5))
    project.write("conftest.py", CHANGED)
    base = (*WANTED, "--datasets", "text:text.txt", "-n", workers)
    assert project.run(*base).ret == 1
    missing = {row["metric"]: row["reason"] for row in project.rows() if row["value"] is None}
    assert set(missing) == {"perplexity", "perplexity.delta"}
    assert "changed while the session ran" in missing["perplexity"]
    assert not (project.path / "harness-report" / INPUTS).exists()
    if workers == "0":
        return
    project.write("conftest.py", "")
    assert project.run(*base, "--resume").ret == 0
    rows = project.rows()
    assert len({row["token_hash"] for row in rows if row["dataset"]}) == 1
