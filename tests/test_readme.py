"""What the README promises of itself, and that every dependency is locked."""

import re
import tomllib
from pathlib import Path
from typing import Any

import torch

from harness.core.contracts import faults

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_the_readme_opens_with_the_two_commands() -> None:
    text = README.read_text()
    block = text.split("```console\n")[1].split("```")[0]
    assert [line.split("#")[0].split("&&")[-1].split()[1:] for line in block.splitlines()] == [
        ["run", "-e", "report"],
        ["run"],
    ]


def test_the_readmes_table_is_the_main_jobs() -> None:
    """Some of its lines, and without the prefill."""
    whole = (ROOT / "docs" / "explanation" / "main-job.md").read_text()
    lines = re.findall(r"^\| `[\w-]+`.*$", README.read_text(), re.MULTILINE)
    assert len(lines) == 3
    cells = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in whole.splitlines()}
    short = {(*row[:5], row[6]) for row in cells if len(row) == 7}
    assert {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines} <= short


def test_every_dependency_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {
        re.split(r"[=<>\[]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert {re.split(r"[=<>\[]", item)[0].lower().replace("_", "-") for item in wanted} <= locked


def test_the_readmes_quantizer_is_a_method() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(block, str(README), "exec"), space)
    assert not list(faults(space["METHOD"]))
    weight = torch.tensor([[0.5, -1.0], [0.0, 0.0]])  # (out, in)
    assert torch.allclose(space["dequantize"](space["quantize"](weight), (2, 2)), weight, atol=1 / 62)
