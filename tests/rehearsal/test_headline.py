"""The very command, `pytest -m gpu --models gpt2,olmo-1b`, in a project folder of a user's own, on a pretended card.

Models and text come over the network from the loopback Hub, pytest's own processes ask the stub driver, and the groups
compute on the pretended card. The folder holds one file, its pyproject.toml.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.run import plan
from tests.rehearsal import driver, folders
from tests.rehearsal.hub import Hub, serving

SITE = Path(__file__).with_name("site")
COMMAND = "pytest -m gpu --models gpt2,olmo-1b"
SHORTER = "pytest -m gpu --models phi-3-mini --datasets wikitext-2"
PYPROJECT = """
[tool.harness.options]
max-tokens = {tokens}
repetitions = 1
report-dir = "measured"
{more}

[tool.pytest.ini_options]
addopts = ["--pyargs"]
testpaths = ["harness.cases"]
"""
TOKENS = 260  # half a window of the default protocol: what a processor multiplies in seconds


@dataclass
class Project:
    """A user's folder and home, with one card in the machine."""

    folder: Path
    home: Path
    hub: Hub

    def write(self, more: str = "") -> None:
        self.folder.mkdir()
        (self.folder / "pyproject.toml").write_text(PYPROJECT.format(tokens=TOKENS, more=more))

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command line, `pytest ...` or `python -m harness ...`, as the user would in the folder."""
        words = shlex.split(command)
        words[:1] = [sys.executable, "-m", "pytest"] if words[0] == "pytest" else [sys.executable]
        card = driver.variables(1)
        own = {**card, "PYTHONPATH": str(SITE), "HARNESS_CACHE": str(self.home / "harness")}
        asking = self.hub.client(self.home / "huggingface")
        world = {name: text for name, text in asking.items() if name not in driver.HIDDEN} | own
        return subprocess.run(words, cwd=self.folder, env=world, capture_output=True, text=True, check=False)

    def rows(self) -> list[dict[str, Any]]:
        """The report directory's rows; the session left a number for every planned case."""
        lines = (self.folder / "measured" / "measurements.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert {row["device"] for row in rows} == {"cuda"}
        assert [
            (row["model"], row["method"], row["metric"], row["reason"]) for row in rows if row["value"] is None
        ] == []
        return rows


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    with serving() as found:
        folders.stock(found, folder, *folders.VOCABULARY)
        yield found


@pytest.fixture
def project(hub: Hub, tmp_path: Path) -> Project:
    hub.asked.clear()
    return Project(tmp_path / "project", tmp_path / "home", hub)


def test_the_very_command(project: Project) -> None:
    project.write()
    result = project.run(COMMAND)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    rows = project.rows()
    assert {row["model"] for row in rows} == {"gpt2", "olmo-1b"}
    for model in ("gpt2", "olmo-1b"):
        found = {(row["method"], row["metric"]) for row in rows if row["model"] == model}
        assert {method for method, _ in found} == set(plan.CORE)
        for family in ("perplexity", "memory", "latency"):
            assert {method for method, metric in found if metric.startswith(family)} == set(plan.CORE)
    assert {row["dataset"] for row in rows if row["metric"].startswith("perplexity")} == {"lee"}
    assert f"{len(rows)} of {len(rows)} gpu cases ran" in result.stdout
    assert f"{len(rows)} planned, {len(rows)} ran, 0 missing" in result.stdout
    report = (project.folder / "measured" / "report.md").read_text()
    assert COMMAND in report
    assert any("resolve" in asked for asked in project.hub.asked)
    left = {path.name for path in project.folder.iterdir()} - {".pytest_cache"}
    assert left == {"measured", "pyproject.toml"}  # no baseline is recorded unasked


def test_a_shorter_one_on_phi_3_mini_and_the_text_of_wikitext_2s_name(project: Project) -> None:
    project.write('methods = "absmax-int8,bnb-nf4"\nmetrics = "perplexity,memory"')
    result = project.run(SHORTER)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    rows = project.rows()
    assert {row["method"] for row in rows} == {"fp32", "absmax-int8", "bnb-nf4"}
    texts = [row for row in rows if row["dataset"]]
    assert {row["dataset"] for row in texts} == {"wikitext-2"}
    assert all("revision b08601e04326" in row["protocol_id"] for row in texts)
    assert any("datasets/Salesforce/wikitext" in asked for asked in project.hub.asked)


def test_doctor_sees_the_card(project: Project) -> None:
    project.write()
    result = project.run("python -m harness doctor")
    assert "Stub H100 80GB" in result.stdout, result.stdout + result.stderr
