"""Processes that record into one folder at the same time: nothing is lost, nothing that is named is removed."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from harness.core.environment import Environment
from harness.core.records import Row
from harness.judge.baselines import LOCK, read_exact, read_overlay, recording
from harness.results import losses
from harness.run import rebaseline

WORLD = Environment(torch="2.13.0", instructions="avx2 avx512", threads=2, machine="a" * 16)
PROCESSES, ROUNDS = 4, 5


def report(folder: Path, number: int) -> Path:
    """A finished session that measured one text of its own."""
    nll = np.full(8, 2 + number, np.float32)
    row = Row(
        model="m", method="nf4", metric="perplexity", device="cpu", reference="fp32", dataset=f"t{number}",
        protocol="chunk:4", protocol_id="tokens: the first 8", token_hash=f"{number:064x}", unit="ppl", count=8,
        value=float(number + 1), nll=losses.save(folder / "nll", nll), environment=WORLD.id,
        detail={"window_counts": [4, 4], "tokens": 8},
    )  # fmt: skip
    (folder / "measurements.jsonl").write_text(row.to_json() + "\n")
    (folder / "environments.json").write_text(json.dumps({WORLD.id: WORLD.to_dict()}))
    return folder


def record(home: Path, process: int) -> None:
    for number in range(process * ROUNDS, (process + 1) * ROUNDS):
        proposal = rebaseline.propose(report(home / f"report-{number}", number), home / "baselines")
        rebaseline.write(proposal, home / "baselines")


def test_nothing_is_lost(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=record, args=(tmp_path, process)) for process in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    texts = {f"t{number}" for number in range(PROCESSES * ROUNDS)}
    _, entries = read_overlay(tmp_path / "baselines/m/nf4@cpu+avx512.yaml")
    assert {entry.dataset for entry in entries} == texts
    assert (read_exact(tmp_path / "baselines/m/nf4.yaml") or {})["texts"].keys() == texts
    assert all(losses.holds(tmp_path / "baselines/m/nll", entry.nll) for entry in entries)
    assert not (tmp_path / "baselines" / LOCK).exists()


def test_whoever_fails_leaves_the_folder_to_the_next(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), recording(tmp_path):
        raise OSError("full")
    with recording(tmp_path):
        assert (tmp_path / LOCK).exists()
