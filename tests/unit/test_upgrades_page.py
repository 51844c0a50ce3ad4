"""What was measured for docs/upgrades.md: the page is made of it, and it is right on every point that is known."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from harness import report
from harness.records import Case, Row, Verdict
from harness.report import Comparison, Entry

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs" / "data" / "upgrades"
PACKED = ("bnb-fp4", "bnb-nf4", "bnb-nf4-dq")
METHODS = ("bnb-int8", *PACKED)
RELEASES = ("0.48.2", "0.49.2", "0.50.2")


def folders(name: str) -> list[Path]:
    return sorted(path for path in (DATA / name).iterdir() if path.is_dir())


@cache
def compared(name: str, a: int, b: int) -> Comparison:
    sides = folders(name)
    return report.compare_paths(sides[a], sides[b], ROOT / "baselines")


def entries(name: str, a: int, b: int, metric: str) -> dict[tuple[str, str], Entry]:
    """By model and method."""
    found = [entry for entry in compared(name, a, b).entries if entry.case.metric == metric]
    return {(entry.case.model, entry.case.method): entry for entry in found}


@cache
def rows(release: str) -> dict[Case, Row]:
    folder = folders("bitsandbytes")[RELEASES.index(release)]
    return {row.case: row for row in report.read_report(folder).rows}


def value(release: str, method: str, metric: str, model: str = "smollm2-135m") -> float:
    (row,) = [
        row for case, row in rows(release).items() if (case.model, case.method, case.metric) == (model, method, metric)
    ]
    assert row.value is not None
    return row.value


def broken(release: str, check: str, model: str = "layer") -> set[str]:
    return {
        case.method
        for case, row in rows(release).items()
        if (case.model, case.metric) == (model, f"invariant.{check}") and row.detail.get("holds") is False
    }


def test_the_page_is_made_of_what_was_measured() -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "upgrades.py"), "--render"]
    done = subprocess.run(script, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == (ROOT / "docs" / "upgrades.md").read_text()


def test_decode_became_many_times_faster_at_0_49() -> None:
    found = entries("bitsandbytes", 0, 1, "latency.decode")
    for method in PACKED:
        entry = found["smollm2-135m", method]
        assert entry.verdict is Verdict.BETTER
        assert entry.change is not None
        assert entry.change < math.log(1 / 3)


def test_int8_is_bit_equal_from_0_49_to_0_50() -> None:
    entry = entries("bitsandbytes", 1, 2, "perplexity")["smollm2-135m", "bnb-int8"]
    assert (entry.verdict, entry.reason) == (Verdict.SAME, "bit-identical losses")


def test_the_unquantized_reference_is_untouched() -> None:
    entry = entries("bitsandbytes", 0, 2, "perplexity")["smollm2-135m", "fp32"]
    assert entry.verdict is Verdict.SAME


def test_packing_halves_scales_and_undoes_double_quantization() -> None:
    for release in RELEASES:
        for method in METHODS:
            before, after = (value(release, method, f"memory.storage{end}") for end in ("", "_after"))
            packs = release != "0.48.2" and method in PACKED
            assert (before != after) == packs, (release, method)
    for release in RELEASES[1:]:
        assert value(release, "bnb-nf4", "memory.storage_after") < value(release, "bnb-nf4", "memory.storage")
        assert value(release, "bnb-nf4-dq", "memory.storage_after") > value(release, "bnb-nf4-dq", "memory.storage")
        assert broken(release, "double_after") == {"bnb-nf4-dq"}
    assert broken("0.48.2", "double_after") == set()


@pytest.mark.parametrize(
    "check",
    ["product.fp32", "product.fp16", "state_dict", "saved_after"]
    + [f"shape.{shape}" for shape in ("63x64", "50x64", "96x64", "64x63", "64x50")],
)
def test_what_breaks_with_packing(check: str) -> None:
    assert [broken(release, check) for release in RELEASES] == [set(), set(PACKED), set(PACKED)]


def test_what_holds_on_every_release() -> None:
    for check in ("scale", "saved_before", "run_twice", "eval_again", "moved", "misspelt", "shape.64x96"):
        assert [broken(release, check) for release in RELEASES] == [set()] * 3, check
    assert all(broken(release, "rows") == {"bnb-int8"} for release in RELEASES)  # a property of LLM.int8


def test_the_size_of_the_damage() -> None:
    for release in RELEASES[1:]:
        for method in ("bnb-fp4", "bnb-nf4"):
            assert 1.05 < value(release, method, "invariant.state_dict", "layer") < 1.2


def test_every_break_of_the_newest_release_is_a_known_fault() -> None:
    for row in rows("0.50.2").values():
        if row.case.family == "invariant":
            assert row.detail["holds"] or row.detail.get("fault"), row.case


def test_0_50_rounds_fp4_otherwise() -> None:
    entry = entries("bitsandbytes", 1, 2, "perplexity")["smollm2-135m", "bnb-fp4"]
    assert entry.verdict is not Verdict.SAME
    assert entry.paired


def test_the_whole_way_is_harm_and_the_step_within_0_49_and_0_50_breaks_nothing_new() -> None:
    assert compared("bitsandbytes", 0, 2).status == 1
    lost = [
        entry
        for entry in compared("bitsandbytes", 1, 2).entries
        if entry.case.family == "invariant" and entry.verdict is Verdict.WORSE
    ]
    assert not lost


def test_the_seeded_fault_is_found_and_nothing_else_is_accused() -> None:
    accused = [entry for entry in compared("seeded", 0, 1).entries if entry.verdict is Verdict.WORSE]
    assert {entry.case.method for entry in accused} == {"bnb-int8"}
    assert "invariant.scale" in {entry.case.metric for entry in accused}


def test_transformers_sides_differ_in_transformers_alone() -> None:
    environment = compared("transformers", 0, 1).environment
    assert [line.partition(":")[0] for line in environment] == ["transformers"]
