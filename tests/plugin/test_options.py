"""The options: documented, and out of other projects' way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.core.options import SETTINGS
from harness.plugin import joined

if TYPE_CHECKING:
    from tests.plugin.conftest import Project


def test_help_documents_every_option_with_its_default(project: Project) -> None:
    text = " ".join(project.pytester.runpytest_inprocess("--help").stdout.str().split())
    for setting in SETTINGS:
        assert f"--{setting.flag}" in text
        assert f"{setting.help} (default: {setting.default or 'off'})".replace(" ", "") in text.replace(" ", "")


def test_elsewhere_only_the_long_spellings_exist(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("def pytest_addoption(parser):\n    parser.addoption('--device', default='theirs')\n")
    pytester.makepyfile("def test_theirs(request):\n    assert request.config.getoption('--device') == 'theirs'\n")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=1)
    assert not (pytester.path / "harness-report").exists()
    assert pytester.runpytest_inprocess("--models", "gpt2").ret == 4
    assert "--harness-models" in pytester.runpytest_inprocess("--help").stdout.str()


def test_the_packaged_cases_run_anywhere(project: Project) -> None:
    (project.path / "pyproject.toml").unlink()
    (project.path / "test_cases.py").unlink()
    result = project.pytester.runpytest_subprocess(
        *("--pyargs", "harness.cases.test_measured", "--harness-models", "tiny-gpt2", "--harness-methods", "nf4"),
        *("--harness-metrics", "memory.storage", "-p", "no:cacheprovider"),
    )
    result.assert_outcomes(passed=2)
    assert len(project.rows()) == 2
    wrong = project.pytester.runpytest_inprocess("--pyargs", "harness.cases.test_measured", "--harness-models", "gpt3")
    assert wrong.ret == 4


def test_asked_for_by_name_the_short_spellings_exist(pytester: pytest.Pytester) -> None:
    assert " --models=" in pytester.runpytest_inprocess("-p", "harness.plugin", "--help").stdout.str()


@pytest.mark.parametrize(
    ("line", "short", "expected", "values"),
    [
        ("--report-dir out -q", True, "--report-dir=out -q", ["out"]),
        ("--report-dir out -q", False, "--report-dir out -q", []),  # another project's own
        ("--harness-report-dir out x", False, "--harness-report-dir=out x", ["out"]),
        ("--report-dir=out --resume x", True, "--report-dir=out --resume x", []),
        ("-n 2 --models a,b -- --device cpu", True, "-n 2 --models=a,b -- --device cpu", ["a,b"]),
        ("--models --device cpu", True, "--models --device cpu", []),
        ("x --models", True, "x --models", []),
    ],
)
def test_values_are_joined_to_our_options_alone(line: str, short: bool, expected: str, values: list[str]) -> None:
    assert joined(line.split(), short=short) == (expected.split(), values)


@pytest.mark.parametrize("where", [(), ("test_cases.py",)], ids=["here", "a file"])
@pytest.mark.parametrize("option", ["--report-dir", "--harness-baselines"])
def test_a_folder_outside_moves_no_project(
    project: Project, tmp_path_factory: pytest.TempPathFactory, option: str, where: tuple[str, ...]
) -> None:
    """pytest takes what follows an option that it does not know yet for a path, and looks for a project there."""
    outside = tmp_path_factory.mktemp("outside") / "out"
    outside.mkdir()
    (outside.parent / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    found = project.look("--co", "-q", "--methods", "fp32", "--metrics", "memory", option, str(outside), *where)
    assert found.ret == 0
    assert [line for line in found.outlines if "::" in line] == [
        f"test_cases.py::test_measured[tiny-gpt2/fp32/memory.{name}/cpu]"
        for name in ("parameters", "footprint", "storage")
    ]


def test_declared_models_and_texts_are_known(project: Project) -> None:
    project.write("notes.txt", "w0 w1 w2 w3 w4 w5 w6 w7 " * 40)
    project.write(
        "pyproject.toml",
        '[tool.harness.models]\nmine = "tiny-gpt2"\n[tool.harness.datasets]\nnotes = "text:notes.txt"\n',
    )
    result = project.run("--models", "mine", "--datasets", "notes", "--methods", "fp32", "--metrics", "perplexity")
    assert result.ret == 0
    assert {(row["model"], row["dataset"]) for row in project.rows()} == {("mine", "notes")}
    assert len(project.rows()[0]["revision"]) == 64
