"""The gate on seeded faults and harmless changes: the quick ones of what `benchmarks/gate/` runs in full."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

GATE = Path(__file__).parents[2] / "benchmarks" / "gate"
QUICK = (  # one of each kind; the bench runs all of them
    "scale off by 1%",
    "one pair of code levels swapped",
    "one layer skipped, and the selection with it",
    "tied head counted twice",
    "tokenizer changed",
    "padding scored",
    "mean over windows for mean over tokens",
    "positions lost",
)
HARMLESS = ("batch of 3", "eager attention")


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, Any]]:
    sys.path.insert(0, str(GATE))
    try:
        yield {name: importlib.import_module(name) for name in ("small", "faults", "device_faults", "silence", "run")}
    finally:
        sys.path.remove(str(GATE))


def test_there_are_enough_faults_and_harmless_changes(parts: dict[str, Any]) -> None:
    names = [fault.name for fault in parts["faults"].FAULTS]
    assert len(set(names)) == len(names) >= 25
    assert set(QUICK) <= set(names)
    changes = [change.name for change in parts["silence"].CHANGES]
    assert len(set(changes)) == len(changes) >= 25
    assert set(HARMLESS) <= set(changes)


@pytest.mark.parametrize("name", QUICK)
def test_a_seeded_fault_ends_in_the_right_verdict_on_the_right_case(parts: dict[str, Any], name: str) -> None:
    fault = next(fault for fault in parts["faults"].FAULTS if fault.name == name)
    found = parts["faults"].run(fault)
    assert found.verdict is fault.verdict, found
    assert fault.words in found.reason
    assert not found.innocent
    assert found.fails


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_change_raises_no_alarm(parts: dict[str, Any], name: str) -> None:
    silence, small = parts["silence"], parts["small"]
    change = next(change for change in silence.CHANGES if change.name == name)
    with (
        silence.recorded(models=("small-gpt2",), methods=("nf4", "bf16")) as bench,
        change.apply(bench, silence.random.Random(1)) as told,
    ):
        outcome = bench.session(**told)
    assert isinstance(outcome, small.Outcome)
    assert len(outcome.rows) == 3 * 4 + 2 * 4  # perplexity and bytes, and what is paired with the reference
    assert not [f"{row.case.id}: {row.reason}" for row in outcome.alarms]


def test_faults_of_a_device_are_seen_on_a_simulated_one(parts: dict[str, Any]) -> None:
    faults = parts["device_faults"]
    for name, run, wanted in (*faults.FAULTS, *faults.HARMLESS):
        row = run()
        assert row.verdict is wanted, (name, row.reason)


def test_parts_of_the_page_are_named(parts: dict[str, Any]) -> None:
    run = parts["run"]
    with pytest.raises(run.UnknownName, match="'powr'"):
        run.main(["--parts", "powr"])
    with pytest.raises(run.BadSpecification, match="write --parts coverage,"):
        run.main(["--parts"])


def test_harmless_changes_of_an_interrupted_run_are_not_measured_again(parts: dict[str, Any], tmp_path: Path) -> None:
    silence, partial = parts["silence"], tmp_path / "partial.jsonl"
    names = [change.name for change in silence.CHANGES[:2]]
    entry = {"change": names[0], "sessions": 10, "alarmed": 1, "verdicts": {"worse": 1}, "largest": {}, "alarms": ["x"]}
    world = {"date": "2026-01-02", "threads": 1, "cpu": "Z80", "instructions": "none"}
    partial.write_text(json.dumps({**entry, "loads": False, "tests": 3, "cases": 4, "world": world}) + "\n")
    found = silence.measure(10, names, partial, minutes=0)
    assert (found["sessions"], found["alarmed"], found["left"]) == (10, 1, 1)
    page = silence.render(found)
    assert "Not measured yet: 1 change. Measured: 1 change on 2026-01-02 on 1 thread of an Z80 (none)." in page
    assert silence.measure(5, names, partial, minutes=0)["left"] == 2, "of another number of repeats"
