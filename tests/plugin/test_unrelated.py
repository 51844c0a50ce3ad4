"""In a project that does not use the harness: what the plugin loads and registers, and what wakes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.core.options import SETTINGS

LOADED = {
    "harness",
    *(f"harness.core{name}" for name in ("", ".errors", ".options", ".specification", ".text")),
    "harness.plugin",
}
PROBE = """
import json, sys
from pathlib import Path

def pytest_unconfigure(config):
    options = [name for group in config._parser._groups for option in group.options for name in option.names()]
    marks = [line.partition(":")[0] for line in config.getini("markers")]
    Path("seen.json").write_text(json.dumps({"modules": sorted(sys.modules), "options": options, "marks": marks}))
"""
CASE = "def test_case(harness_case):\n    assert harness_case.model == 'smollm2-135m'\n"


def session(folder: Path, *arguments: str, expected: int = 0) -> tuple[dict[str, Any], str]:
    """What pytest, its plugins loaded as they are installed, ends with; and what it printed."""
    world = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, env=world, capture_output=True, text=True, check=False)
    assert done.returncode == expected, done.stdout + done.stderr
    return json.loads((folder / "seen.json").read_text()), done.stdout + done.stderr


@pytest.fixture
def unrelated(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(PROBE)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "theirs"\n')
    (tmp_path / "test_theirs.py").write_text("def test_theirs():\n    pass\n")
    return tmp_path


def test_the_plugin_loads_seven_modules_and_registers_long_options_alone(unrelated: Path) -> None:
    with_it, _ = session(unrelated)
    without, _ = session(unrelated, "-p", "no:harness.plugin")
    more = set(with_it["modules"]) - set(without["modules"])
    assert {name for name in more if name.partition(".")[0] == "harness"} == LOADED
    assert {name.partition(".")[0] for name in more} - {"harness"} <= set(sys.stdlib_module_names)
    assert set(with_it["options"]) - set(without["options"]) == {f"--harness-{setting.flag}" for setting in SETTINGS}
    assert with_it["marks"] == without["marks"]
    assert not (unrelated / "harness-report").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--harness-max-tokens", "64"), "def test_theirs():\n    pass\n"),
        ((), "def test_theirs(harness_check):\n    pass\n"),
        (("--co",), CASE),
    ],
    ids=["an option", "the fixture", "a case"],
)
def test_what_wakes_it(unrelated: Path, arguments: tuple[str, ...], text: str) -> None:
    (unrelated / "test_theirs.py").write_text(text)
    seen, _ = session(unrelated, *arguments)
    assert "harness.plugin.collector" in seen["modules"]
    assert {"gpu", "perplexity"} <= set(seen["marks"])
    assert "--models" not in seen["options"]


def test_workers_that_find_a_case_nobody_expected_say_what_to_write(unrelated: Path) -> None:
    (unrelated / "test_theirs.py").write_text(CASE)
    _, output = session(unrelated, "-n", "1", expected=1)
    assert "give pyproject.toml a [tool.harness] table, or pytest -p harness.plugin" in output
    assert not (unrelated / "harness-report").exists()
