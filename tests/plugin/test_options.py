"""The options: documented, and out of other projects' way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.core.options import SETTINGS

if TYPE_CHECKING:
    import pytest

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
