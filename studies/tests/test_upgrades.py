"""What was measured for docs/studies/upgrades.md: right on every point that is known."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import harness
from harness.core.records import Verdict
from harness.judge.two_reports import Comparison, Entry

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs" / "studies" / "data" / "upgrades"
PACKED = ("bnb-fp4", "bnb-nf4", "bnb-nf4-dq")


def folders(name: str) -> list[Path]:
    return sorted(path for path in (DATA / name).iterdir() if path.is_dir())


@cache
def compared(name: str, a: int, b: int) -> Comparison:
    sides = folders(name)
    return harness.compare(sides[a], sides[b], baselines=ROOT / "baselines")


def entries(name: str, a: int, b: int, metric: str) -> dict[tuple[str, str], Entry]:
    """By model and method."""
    found = [entry for entry in compared(name, a, b).entries if entry.case.metric == metric]
    return {(entry.case.model, entry.case.method): entry for entry in found}


def test_the_page_is_made_of_what_was_measured() -> None:
    script = [sys.executable, "-m", "studies.upgrades.upgrades", "--render"]
    done = subprocess.run(script, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == (ROOT / "docs" / "studies" / "upgrades.md").read_text()


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
