"""The life of a baseline: unrecorded, recorded, same, changed, recorded anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.plugin.conftest import Project

WANTED = ("--methods", "nf4", "--metrics", "perplexity,memory.storage,memory.parameters")


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.long)])
def test_the_life_of_a_baseline(project: Project, workers: str) -> None:
    run = (*WANTED, "-n", workers)
    assert project.run(*run, "--require-baselines").ret == 1  # nothing recorded yet
    assert not (project.path / "baselines").exists()

    assert project.run(*run, "--regen-all").ret == 0
    exact = project.path / "baselines" / "tiny-gpt2" / "nf4.yaml"
    assert exact.is_file()
    overlays = list(exact.parent.glob("nf4@*.yaml"))
    assert len(overlays) == 1
    assert list((exact.parent / "nll").glob("*.npz"))

    assert project.run(*run, "--require-baselines").ret == 0
    assert {row["verdict_baseline"] for row in project.rows()} == {"same"}

    text = exact.read_text()
    stored = next(
        str(int(row["value"])) for row in project.rows() if row["method"] == "nf4" and "storage" in row["metric"]
    )
    exact.write_text(text.replace(stored, str(int(stored) - 1)))
    broken = project.run(*run)
    assert broken.ret == 1
    assert exact.read_text() != text  # a failure writes nothing
    forced = project.run(*run, "--force-regen")
    assert forced.ret == 1
    assert stored in exact.read_text()
    assert project.run(*run, "--require-baselines").ret == 0


def test_names_never_collide(project: Project) -> None:
    project.write("pyproject.toml", '[tool.harness.models]\na-b = "tiny-gpt2"\na_b = "tiny-gpt2"\n')
    run = ("--models", "a-b,a_b", "--methods", "fp32", "--metrics", "memory.storage")
    assert project.run(*run, "--regen-all").ret == 0
    assert {path.name for path in (project.path / "baselines").iterdir()} == {"a-b", "a_b"}


def test_stop_early_reads_no_further_than_it_must(project: Project) -> None:
    run = ("--methods", "absmax-int8", "--metrics", "perplexity", "--max-tokens", "8192")
    unknown = project.run(*run, "--stop-early")
    assert unknown.ret == 0
    first = next(row for row in project.rows() if row["metric"] == "perplexity.delta")
    assert first["detail"]["tokens_used"] == first["detail"]["tokens_available"]  # no recorded variance: all of it
    assert project.run(*run, "--regen-all").ret == 0
    whole = next(row for row in project.rows() if row["metric"] == "perplexity.delta")
    assert project.run(*run, "--stop-early").ret == 0
    rows = project.rows()
    assert [(row["method"], row["metric"]) for row in rows] == [
        ("fp32", "perplexity"),
        ("absmax-int8", "perplexity.delta"),  # a text that was not read to its end has no perplexity
    ]
    stopped = rows[1]
    assert stopped["detail"]["decided"] == "below"
    assert stopped["detail"]["tokens_used"] < stopped["detail"]["tokens_available"]
    assert stopped["interval"][0] <= whole["value"] <= stopped["interval"][1]
    assert stopped["verdict_reference"] == "within bound"
    assert stopped["verdict_baseline"] == "not comparable"
    assert "tokens" in stopped["reason"]
    assert project.run(*run, "--stop-early", "--methods", "absmax-int8", "--require-baselines", "-k", "delta").ret == 0


def test_a_text_read_to_its_end_for_want_of_a_decision_has_its_ordinary_figure(project: Project) -> None:
    run = ("--methods", "absmax-int8", "--metrics", "perplexity.delta", "--max-tokens", "2048")
    assert project.run(*run, "--regen-all").ret == 0
    whole = project.rows()[0]
    place = next((project.path / "baselines").glob("*/absmax-int8.yaml"))
    place.write_text(place.read_text().replace("interval:", "was_interval:"))  # then no variance is recorded
    assert project.run(*run, "--stop-early", "--require-baselines").ret == 0
    (row,) = project.rows()
    assert row["detail"]["tokens_used"] == row["detail"]["tokens_available"]
    assert {name: row[name] for name in ("value", "interval", "nll")} == {
        name: whole[name] for name in ("value", "interval", "nll")
    }
    assert row["verdict_baseline"] == "same"
