"""What weights and texts were when a session began."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.core.contracts import Checkpoint
from harness.core.errors import HarnessError
from harness.run import fingerprints
from harness.run.fingerprints import Inputs


def test_an_input_that_changed_is_refused_by_name() -> None:
    held = Inputs({"weights of m": "a"})
    held.hold("weights of m", "a")
    held.hold("weights of n", "b")  # not known when the session began
    assert held.found == {"weights of m": "a", "weights of n": "b"}
    with pytest.raises(HarnessError, match=r"the weights of m changed .* --resume"):
        held.hold("weights of m", "c")


def test_files_that_are_written_to_are_seen(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    checkpoint = Checkpoint("m", tmp_path, "a")
    held = Inputs({})
    assert not held.see("m", tmp_path)
    assert Inputs(held.found).see("m", tmp_path)
    held.untouched(checkpoint)
    status = weights.stat()
    (tmp_path / "new").write_bytes(b"two")
    os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (tmp_path / "new").replace(weights)  # same name, size and date
    with pytest.raises(HarnessError, match="changed while they were in use"):
        held.untouched(checkpoint)


def test_they_travel_through_the_report_directory(tmp_path: Path) -> None:
    assert fingerprints.read(tmp_path) == {}
    fingerprints.write(tmp_path, {"weights of m": "a"})
    assert fingerprints.read(tmp_path) == {"weights of m": "a"}
    (tmp_path / fingerprints.FILE).write_text("[" * 100_000)
    assert fingerprints.read(tmp_path) == {}


def test_files_that_changed_while_they_were_hashed_are_hashed_again(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    revisions = ["a", "b"]
    began = {"weights of m": "b", fingerprints.files("m"): "another stamp"}
    found = Inputs(began).checkpoint(lambda: Checkpoint("m", tmp_path, revisions.pop(0)))
    assert found.revision == "b"
    with pytest.raises(HarnessError, match="the weights of m changed"):
        Inputs(began).checkpoint(lambda: Checkpoint("m", tmp_path, "c"))
