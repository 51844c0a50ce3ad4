"""What the README promises of itself, and that every dependency is locked."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert len(README.read_text().splitlines()) < 250


def test_the_readme_opens_with_the_two_commands() -> None:
    text = README.read_text()
    block = text.split("```console\n")[1].split("```")[0]
    assert [line.split("#")[0].split("&&")[-1].split()[1:] for line in block.splitlines()] == [
        ["run", "-e", "report"],
        ["run"],
    ]


def test_every_dependency_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {
        re.split(r"[=<>\[]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert {re.split(r"[=<>\[]", item)[0].lower().replace("_", "-") for item in wanted} <= locked
