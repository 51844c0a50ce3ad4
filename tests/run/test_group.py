"""What a group does with a model once it is loaded, on a device that is pretended."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

from harness.core import catalog
from harness.core.environment import Environment
from harness.core.errors import HarnessError
from harness.core.records import Case, Figure
from harness.inputs.models import checkpoints, sizes
from harness.metrics.measuring import census
from harness.run.group import Group

METHOD = SimpleNamespace(
    requires=(), parameters={}, calibrated=False, grid="", notes={"cuda": "in fp16"}, load=lambda *args: nn.Identity()
)


class Device:
    """A card on which nothing can be shown to run."""

    precision = MappingProxyType({"tf32": False})
    peak_note = ""

    def __init__(self) -> None:
        self.asked = 0

    def reset_peak(self) -> None:
        pass

    def peak(self) -> dict[str, int]:
        return {"allocated": 300, "reserved": 512}

    def proof(self, work: Any) -> dict[str, int]:
        self.asked += 1
        raise HarnessError("no bytes on the CUDA device")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Group:
    monkeypatch.setattr(sizes, "predict", lambda *args: {"memory.storage": 20})
    monkeypatch.setattr(sizes, "measure", lambda model: {"memory.storage": 20})
    monkeypatch.setattr(checkpoints, "modules", lambda *args: {})
    monkeypatch.setattr(census, "census", lambda *args: {})
    found: Any = Group.__new__(Group)
    found.job = SimpleNamespace(model="m", method="nf4", device="meta")
    found.method = METHOD
    found.arguments = SimpleNamespace(values={}, dtype="fp16")
    found.checkpoint = SimpleNamespace(revision="r", note="", grid="", identity={})
    found.config = found._model = None
    found.line, found.device, found.proof = SimpleNamespace(send=lambda reply: None), Device(), {}
    return found  # type: ignore[no-any-return]


def test_without_evidence_every_case_fails_alike(pretended: Group) -> None:
    for _ in range(2):
        with pytest.raises(HarnessError, match="no bytes on the CUDA device"):
            pretended.model  # noqa: B018
    assert pretended.device.asked == 2  # type: ignore[union-attr]
    assert pretended.before == {"memory.storage": 20, "allocated": 300, "reserved": 512}


def test_evidence_is_taken_once(pretended: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretended.device, "proof", lambda work: {"allocated": 64})
    model = pretended.model
    monkeypatch.undo()
    assert pretended.model is model
    assert pretended.proof == {"allocated": 64}


def test_a_row_says_what_a_reader_must_know(pretended: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretended.device, "proof", lambda work: {"allocated": 64})
    monkeypatch.setattr(Group, "key", lambda self, case, stop: "k")
    pretended.inputs = SimpleNamespace(untouched=lambda checkpoint: None)  # type: ignore[assignment]
    pretended.method_id, pretended.reference_id, pretended.libraries = "nf4:dtype=fp16", "fp32:dtype=fp32", {}
    pretended.environment = Environment(device="cuda")

    def measured(metric: str, device: str, method: str = "nf4") -> dict[str, Any]:
        return pretended.measure(Case("m", method, "", "", metric, device)).detail

    told = {"proof": {"allocated": 64}, "precision": {"tf32": False}, "method_note": "in fp16"}
    assert measured("memory.load_peak", "cuda") == {"allocated": 300, "reserved": 512, **told}
    assert "method_note" not in measured("memory.load_peak", "cpu")
    known = catalog.metrics()
    monkeypatch.setattr(catalog, "metrics", lambda: {**known, "latency": replace(known["latency"], measure=timed)})
    assert measured("latency.decode", "cuda") == {"log_ratio": 0.7, "reference_id": "fp32:dtype=fp32", **told}
    assert "reference_id" not in measured("latency.decode", "cuda", "fp32")


def timed(subject: Any, member: Any) -> Figure:
    return Figure(0.2, "s", detail={"log_ratio": 0.7})
