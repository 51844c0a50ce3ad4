"""Published figures in a session: a section of its report, beside what it measured; one line where none can be had."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.core.options import Declared, Options
from harness.plugin.collector import Publisher
from harness.results.directory import ReportDirectory

if TYPE_CHECKING:
    from tests.plugin.conftest import Project

CLAIMS = """
schema = 1
report = "toy"
model = "gpt2"
text = "some text"
protocol = "named"
timed = "forward"
[missing]
latency = "the card"
[[claim]]
part = "a"
method = "fp32"
specification = "fp32"
[claim.figures.memory]
published = "474.70"
unit = "MiB"
verdict = "reproduced"
convention = { remainder = "fp32" }
[claim.figures.latency_s]
published = "0.10"
unit = "s"
verdict = "underspecified"
[claim.figures.perplexity]
published = "29.94"
unit = "ppl"
verdict = "needs weights"
dataset = "synthetic"
text_protocol = "chunk:64"
[[claim]]
part = "a"
method = "int8"
specification = "absmax-int8"
reference = "fp32"
[claim.figures.latency_s]
published = "0.25"
unit = "s"
verdict = "underspecified"
"""


@pytest.fixture
def toy(project: Project) -> Project:
    project.write("baselines/published/toy.toml", CLAIMS)
    project.write("test_figures.py", "from harness.cases.test_published import pytest_generate_tests, test_published\n")
    return project


def page(toy: Project) -> str:
    return (toy.path / "harness-report" / "published.md").read_text()


def test_figures_alone_are_a_report_of_their_own(toy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(toy.path / "empty"))
    toy.write("baselines/published/toy.toml", CLAIMS.replace("474.70", "474.71"))
    result = toy.run("-m", "published", "test_figures.py", "--models", "gpt2")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "toy/a/fp32/memory: 474.71 MiB is refuted, not reproduced: *gives 474.70*",  # a wrong digit fails
            "toy/a/fp32/perplexity: missing: model *name a local copy as path:DIR",  # so do weights asked for in vain
            "4 figures: 1 refuted, 1 needs weights, 2 underspecified. Memory: 0 of 1 figures reproduced.",
        ]
    )
    assert "Published figures, computed again: 4 figures" in toy.report()
    assert page(toy).startswith("# Published figures, computed again\n\n4 figures")
    assert "Nothing was measured" not in toy.report()


def test_figures_join_the_report_of_what_was_measured(toy: Project) -> None:
    wanted = ("--methods", "absmax-int8", "--metrics", "memory.storage,latency.forward", "--repetitions", "6")
    assert toy.run(*wanted, "-m", "published or memory or latency").ret == 0
    report = toy.report()
    assert "| `absmax-int8`" in report
    assert "| toy | int8 (a) | 0.25 s | 2.500 | " in page(toy)  # the session's own ratio beside it
    assert "ours on tiny-gpt2, cpu." in page(toy)
    folder = toy.path / "harness-report"
    (folder / "published.json").unlink()
    assert toy.run("-m", "published", "test_figures.py").ret == 0
    assert toy.report().split("## To reproduce")[0] == report.split("## To reproduce")[0]  # what was measured stays
    directory = ReportDirectory(folder)
    directory.open(keep=False)
    directory.begin()
    assert not (folder / "published.json").exists()  # a new session starts anew


def test_measurements_that_do_not_read_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "measurements.jsonl").write_text("no row\n")
    publisher = Publisher(Options(Declared(tmp_path), report_dir=tmp_path))
    publisher.entries = {"toy": {}}
    with pytest.raises(pytest.UsageError, match=r"measurements.jsonl:1 is no measurement"):
        publisher.pytest_sessionfinish(None)  # type: ignore[arg-type]
