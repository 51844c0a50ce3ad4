"""What a session says before it measures: `--co`, the plan command, and the order of what is collected."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

import harness
from harness.__main__ import main

if TYPE_CHECKING:
    from tests.plugin.conftest import Project

WANTED = ("--methods", "nf4,fp4", "--metrics", "memory,perplexity")


def planned() -> list[str]:
    options = {"models": "tiny-gpt2", "datasets": "synthetic", "device": "cpu"}
    return [case.id for case in harness.plan(methods="nf4,fp4", metrics="memory,perplexity", **options)]


def test_collecting_says_what_would_be_measured(project: Project) -> None:
    result = project.look("--collect-only", *WANTED, "-k", "not footprint")
    assert result.ret == 0
    count = sum("footprint" not in name for name in planned())
    result.stdout.fnmatch_lines(
        [
            "*<Function test_measured*",
            f"{count} cases: tiny-gpt2 under 3 methods on cpu",
            "texts: synthetic chunk:512",
            "time: about * (from two cores with AVX2)",
            "download: nothing",
            "memory, and what does not fit here: python -m harness plan *--models tiny-gpt2 *-k 'not footprint'",
        ]
    )
    assert not (project.path / "harness-report").exists()


def test_the_plan_command_takes_pytests_options(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", "tiny-gpt2", "--methods", "nf4", "--metrics", "memory.storage,memory.footprint"]
    assert main(["plan", *arguments, "-k", "storage"]) == 0
    said = capsys.readouterr().out
    assert "2 cases: tiny-gpt2 under 2 methods on cpu" in said
    assert re.search(r"^tiny-gpt2 +nf4 +cpu +1 +\d+ s +\d+ +[\d,]+ +yes$", said, re.MULTILINE)
    assert "memory: " in said
    assert main(["plan", *arguments, "-k", "nothing-like-it"]) == 2
    assert "select no case" in capsys.readouterr().err
    assert main(["plan", "--models", "gpt3"]) == 2
    assert "gpt3" in capsys.readouterr().err


def test_shuffled_cases_go_in_plan_order_among_other_tests(project: Project) -> None:
    """As pytest-randomly shuffles; it is not among what is locked."""
    shuffle = "import random\ndef pytest_collection_modifyitems(items):\n    random.Random(1).shuffle(items)\n"
    project.write("conftest.py", shuffle)
    measured = "from harness.cases.test_measured import test_measured\n"
    theirs = "import pytest\n@pytest.mark.parametrize('n', range(9))\ndef test_theirs(n):\n    pass\n"
    project.write("test_cases.py", measured + theirs)
    result = project.look("--collect-only", "-q", *WANTED)
    assert result.ret == 0
    names = [line.partition("[")[2].rpartition("]")[0] for line in result.outlines if "::" in line]
    assert [name for name in names if "/" in name] == planned()
    others = [name for name in names if "/" not in name]
    assert sorted(others) == list("012345678") != others
    assert not result.stdout.str().count("would be")  # -q gives node ids to other programs
