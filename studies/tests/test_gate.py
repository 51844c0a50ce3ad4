"""The gate on seeded faults and harmless changes: the quick ones of what `studies/gate/` runs in full."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from harness.core.errors import BadSpecification, UnknownName
from studies.gate import device_faults, mutations, run, silence, small

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


def test_there_are_enough_faults_and_harmless_changes() -> None:
    names = [fault.name for fault in mutations.FAULTS]
    assert len(set(names)) == len(names) >= 25
    assert set(QUICK) <= set(names)
    changes = [change.name for change in silence.CHANGES]
    assert len(set(changes)) == len(changes) >= 25
    assert set(HARMLESS) <= set(changes)


@pytest.mark.parametrize("name", QUICK)
def test_a_seeded_fault_ends_in_the_right_verdict_on_the_right_case(name: str) -> None:
    fault = next(fault for fault in mutations.FAULTS if fault.name == name)
    found = mutations.run(fault)
    assert found.verdict is fault.verdict, found
    assert fault.words in found.reason
    assert not found.innocent
    assert found.fails


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_change_raises_no_alarm(name: str) -> None:
    change = next(change for change in silence.CHANGES if change.name == name)
    with (
        silence.recorded(models=("small-gpt2",), methods=("nf4", "bf16")) as bench,
        change.apply(bench, random.Random(1)) as told,
    ):
        outcome = bench.session(**told)
    assert isinstance(outcome, small.Outcome)
    assert len(outcome.rows) == 3 * 4 + 2 * 4  # perplexity and bytes, and what is paired with the reference
    assert not [f"{row.case.id}: {row.reason}" for row in outcome.alarms]


def test_faults_of_a_device_are_seen_on_a_simulated_one() -> None:
    for name, wrong, wanted in (*device_faults.FAULTS, *device_faults.HARMLESS):
        row = wrong()
        assert row.verdict is wanted, (name, row.reason)


def test_parts_of_the_page_are_named() -> None:
    with pytest.raises(UnknownName, match="'powr'"):
        run.main(["--parts", "powr"])
    with pytest.raises(BadSpecification, match="write --parts coverage,"):
        run.main(["--parts"])


def test_harmless_changes_of_an_interrupted_run_are_not_measured_again(tmp_path: Path) -> None:
    partial = tmp_path / "partial.jsonl"
    names = [change.name for change in silence.CHANGES[:2]]
    entry = {"change": names[0], "sessions": 10, "alarmed": 1, "verdicts": {"worse": 1}, "largest": {}, "alarms": ["x"]}
    world = {"date": "2026-01-02", "threads": 1, "cpu": "Z80", "instructions": "none"}
    partial.write_text(json.dumps({**entry, "loads": False, "tests": 3, "cases": 4, "world": world}) + "\n")
    found = silence.measure(10, names, partial, minutes=0)
    assert (found["sessions"], found["alarmed"], found["left"]) == (10, 1, 1)
    page = silence.render(found)
    assert "Not measured yet: 1 change. Measured: 1 change on 2026-01-02 on 1 thread of an Z80 (none)." in page
    assert silence.measure(5, names, partial, minutes=0)["left"] == 2, "of another number of repeats"
