"""docs/examples: workflows and actions are what GitHub's schemas ask for, and every command in them is one of ours."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.__main__ import parser
from harness.core.options import SETTINGS

HOME = Path(__file__).parents[1] / "docs" / "examples"
WORKFLOWS, ACTIONS = sorted(HOME.glob("*.yml")), sorted(HOME.glob("*/action.yml"))
TOP = {"name", "on", "permissions", "jobs", "env", "concurrency", "defaults"}
JOB = {"runs-on", "steps", "needs", "if", "strategy", "env", "permissions", "timeout-minutes"}
STEP = {"name", "id", "if", "uses", "with", "run", "shell", "env", "continue-on-error", "working-directory"}
USES = re.compile(r"\./[\w./-]+|[\w-]+/[\w./-]+@(v\d+|[0-9a-f]{40})")
EXPRESSION = re.compile(r"\$\{\{ *([^}]+?) *\}\}")
OPTIONS = {f"--{prefix}{setting.flag}" for setting in SETTINGS for prefix in ("", "harness-")}


def read(path: Path) -> dict[str, Any]:
    """As GitHub reads it: 'on' is a word there."""
    told = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    assert isinstance(told, dict)
    return told


def check_steps(steps: list[dict[str, Any]], *, composite: bool) -> None:
    for step in steps:
        assert step.keys() <= STEP, step
        assert ("uses" in step) != ("run" in step), step
        if "uses" in step:
            assert USES.fullmatch(step["uses"]), step["uses"]
            assert not {"shell", "working-directory"} & step.keys()
        else:
            assert "with" not in step
            assert not composite or step["shell"] == "bash"
            # what a pull request may say reaches a script through the environment alone
            assert not EXPRESSION.findall(step["run"]) or not composite, step["run"]
            script = EXPRESSION.sub("1", step["run"])
            assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    ids = [step["id"] for step in steps if "id" in step]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows(path: Path) -> None:
    told = read(path)
    assert {"name", "on", "jobs"} <= told.keys() <= TOP
    for job in told["jobs"].values():
        assert {"runs-on", "steps"} <= job.keys() <= JOB
        check_steps(job["steps"], composite=False)
        needed = job.get("needs", [])
        assert {needed} if isinstance(needed, str) else set(needed) <= told["jobs"].keys()


@pytest.mark.parametrize("path", ACTIONS, ids=lambda path: path.parent.name)
def test_actions(path: Path) -> None:
    told = read(path)
    assert told.keys() == {"name", "description", "inputs", "outputs", "runs"}
    assert told["runs"]["using"] == "composite"
    check_steps(told["runs"]["steps"], composite=True)
    for one in told["inputs"].values():
        assert "description" in one
        assert "default" in one or one["required"] == "true"
    assert set(re.findall(r"\binputs\.([\w-]+)", path.read_text())) == told["inputs"].keys()
    ids = {step["id"] for step in told["runs"]["steps"] if "id" in step}
    assert set(re.findall(r"\bsteps\.([\w-]+)\.", path.read_text())) <= ids


def test_a_workflow_gives_an_action_what_it_takes() -> None:
    known = {f"./.github/actions/{path.parent.name}": read(path)["inputs"] for path in ACTIONS}
    used = [
        step
        for path in WORKFLOWS
        for job in read(path)["jobs"].values()
        for step in job["steps"]
        if step.get("uses", "").startswith("./")
    ]
    assert [step["uses"] for step in used] == list(known)
    for step in used:
        required = {name for name, told in known[step["uses"]].items() if told.get("required") == "true"}
        assert required <= step["with"].keys() <= known[step["uses"]].keys()


def test_every_command_and_option_is_ours() -> None:
    texts = [path.read_text() for path in (*WORKFLOWS, *ACTIONS, *HOME.glob("*.sbatch"))]
    commands = [line for text in texts for line in re.findall(r"python -m harness ([^;|>\n]*)", text)]
    assert len(commands) >= 3
    for line in commands:
        parser().parse_args(shlex.split(line))  # ends the process where there is no such command or option
    named = {option for text in texts for option in re.findall(r"(?<=\s)--(?:harness-)?[a-z-]+", text)}
    others = {"--no-deps", "--method", "--paginate", "--silent", "--field", "--jq", "--pyargs", "--job-name", "--array"}
    others |= {"--cpus-per-task", "--gpus-per-task"}
    assert named - others <= OPTIONS
