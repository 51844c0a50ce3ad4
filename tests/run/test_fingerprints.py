"""What weights and texts were when a session began."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.core.contracts import Checkpoint
from harness.core.errors import HarnessError
from harness.results.directory import INPUTS, ReportDirectory
from harness.run import fingerprints
from harness.run.fingerprints import StartInputs


def test_an_input_that_changed_is_refused_by_name() -> None:
    held = StartInputs({"weights of m": "a"})
    held.hold("weights of m", "a")
    held.hold("weights of n", "b")  # not known when the session began
    assert held.seen == {"weights of m": "a", "weights of n": "b"}
    with pytest.raises(HarnessError, match=r"the weights of m changed .* --resume"):
        held.hold("weights of m", "c")


def test_files_that_are_written_to_are_seen(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    checkpoint = Checkpoint("m", tmp_path, "a")
    held, made = StartInputs({}), [checkpoint] * 3
    assert held.checkpoint(made.pop) == checkpoint  # hashed twice: nobody saw its files before
    assert StartInputs(held.seen).checkpoint(made.pop) == checkpoint
    assert not made
    held.untouched(checkpoint)
    status = weights.stat()
    (tmp_path / "new").write_bytes(b"two")
    os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (tmp_path / "new").replace(weights)  # same name, size and date
    with pytest.raises(HarnessError, match="changed while they were in use"):
        held.untouched(checkpoint)


def test_a_config_that_changed_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")

    def of(theta: str) -> Checkpoint:
        return Checkpoint("m", tmp_path, "a", identity={"weights": "w", "config.rope_theta": theta})

    began = StartInputs({})
    began.checkpoint(lambda: of("10000"))
    with pytest.raises(HarnessError, match="the config, tokenizer or code of m changed while the session ran"):
        StartInputs(began.seen).checkpoint(lambda: of("11000"))


def test_they_reach_workers_of_xdist_through_the_report_directory(tmp_path: Path) -> None:
    directory = ReportDirectory(tmp_path)
    assert directory.known_inputs() == {}
    directory.own()
    directory.keep_inputs({"weights of m": "a"})
    assert directory.known_inputs() == {"weights of m": "a"}
    for text in ("[" * 100_000, "[]", "3"):
        (directory.folder / INPUTS).write_text(text)
        assert directory.known_inputs() == {}
    directory.release()
    assert not (directory.folder / INPUTS).exists()


def test_the_state_of_files_says_nothing_on_another_machine() -> None:
    inputs = {"weights of m": "a", fingerprints.files("m"): "b", "tokens of t under chunk:4 for m": "c"}
    assert fingerprints.portable(inputs) == {"weights of m": "a", "tokens of t under chunk:4 for m": "c"}


def test_files_that_changed_while_they_were_hashed_are_hashed_again(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    revisions = ["a", "b"]
    began = {"weights of m": "b", fingerprints.files("m"): "another stamp"}
    found = StartInputs(began).checkpoint(lambda: Checkpoint("m", tmp_path, revisions.pop(0)))
    assert found.revision == "b"
    with pytest.raises(HarnessError, match="the weights of m changed"):
        StartInputs(began).checkpoint(lambda: Checkpoint("m", tmp_path, "c"))
