"""The life of a baseline: recorded, same, changed, recorded anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pathlib import Path

    from tests.plugin.conftest import Project

WANTED = ("--methods", "nf4", "--metrics", "perplexity,memory.storage,memory.parameters")


def rewrite(path: Path, buffers: int) -> None:
    """Another layout, and a record of before a buffer was there: its bytes are in the census and in the storage."""
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    if buffers:
        weights = document["weights"]["cpu"]
        weights["bytes"]["memory.storage"] -= buffers
        weights["census"]["bytes_by_dtype"]["float32"] -= buffers
        del document["check"]  # as one who edits by hand must
    path.write_text(yaml.safe_dump(document, sort_keys=False, default_flow_style=True, width=60))


def test_the_life_of_a_baseline(project: Project) -> None:
    assert project.run(*WANTED, "--regen-all").ret == 0
    exact = project.path / "baselines" / "tiny-gpt2" / "nf4.yaml"
    assert exact.is_file()
    overlays = list(exact.parent.glob("nf4@*.yaml"))
    assert len(overlays) == 1
    assert list((exact.parent / "nll").glob("*.npz"))

    rewrite(exact, 0)
    laid_out = exact.read_text()
    assert project.run(*WANTED, "--require-baselines").ret == 0
    assert {row["verdict_baseline"] for row in project.rows()} == {"same"}

    rewrite(exact, 131072)
    broken = project.run(*WANTED, "--require-baselines", "-n", "2")
    broken.assert_outcomes(failed=1, passed=6)  # one fact, one failure
    rows = {row["metric"]: row for row in project.rows() if row["method"] == "nf4"}
    first = "tiny-gpt2/nf4/memory.parameters/cpu"
    assert [name for name, row in rows.items() if row["verdict"] == "worse"] == ["memory.parameters"]
    assert all(row["reason"].endswith(f"see {first}") for row in rows.values() if row["metric"] != "memory.parameters")
    broken.stdout.fnmatch_lines(
        [
            f"worse: {first}: exact facts changed",
            "*changed*census on cpu, bytes_by_dtype.float32: * -> *",
            "*recorded*tiny-gpt2/nf4.yaml, recorded 20*Z on cpu:*",
            "*measure*pytest --pyargs harness.cases *",
            "*record*pytest --pyargs harness.cases --regen-all *",
        ]
    )
    assert exact.read_text() != laid_out  # a failure writes nothing
    assert project.run(*WANTED, "--force-regen").ret == 1
    assert yaml.safe_load(exact.read_text())["weights"] == yaml.safe_load(laid_out)["weights"]
    rewrite(exact, 131072)
    alone = project.run(*WANTED, "-k", "storage or delta")  # the first of what is selected
    alone.assert_outcomes(failed=1, passed=2, deselected=4)
    assert {row["verdict"] for row in project.rows() if row["metric"] == "memory.storage"} == {"same", "worse"}


def test_stop_early_reads_no_further_than_it_must(project: Project) -> None:
    run = ("--methods", "absmax-int8", "--metrics", "perplexity", "--max-tokens", "8192")
    unknown = project.run(*run, "--stop-early")
    assert unknown.ret == 0
    first = next(row for row in project.rows() if row["metric"] == "perplexity.delta")
    assert first["detail"]["tokens_used"] == first["detail"]["tokens_available"]  # no recorded variance: all of it
    assert project.run(*run, "--regen-all").ret == 0
    whole = next(row for row in project.rows() if row["metric"] == "perplexity.delta")
    for name in ("value", "interval", "nll"):
        assert first[name] == whole[name]  # read to its end it has its ordinary figure
    assert project.run(*run, "--stop-early", "--require-baselines").ret == 0
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
