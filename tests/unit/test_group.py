"""What a group does with a model once it is loaded, on a device that is pretended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from harness import census, checkpoints, memory
from harness.errors import HarnessError
from harness.group import Group


class Device:
    """A card on which nothing can be shown to run."""

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
    monkeypatch.setattr(memory, "predict", lambda *args: {"memory.storage": 20})
    monkeypatch.setattr(memory, "measure", lambda model: {"memory.storage": 20})
    monkeypatch.setattr(checkpoints, "modules", lambda *args: {})
    monkeypatch.setattr(census, "census", lambda *args: {})
    found: Any = Group.__new__(Group)
    found.job = SimpleNamespace(method="nf4", device="meta")
    found.method = SimpleNamespace(requires=(), parameters={}, load=lambda *args: nn.Identity())
    found.arguments = SimpleNamespace(values={}, dtype="fp16")
    found.checkpoint, found.config, found._model = None, None, None
    found.connection, found.device, found.proof = SimpleNamespace(send=lambda reply: None), Device(), {}
    return found  # type: ignore[no-any-return]


def test_without_evidence_every_case_fails_alike(pretended: Group) -> None:
    for _ in range(2):
        with pytest.raises(HarnessError, match="no bytes on the CUDA device"):
            pretended.model  # noqa: B018
    assert pretended.device.asked == 2  # type: ignore[attr-defined]
    assert pretended.before == {"memory.storage": 20, "allocated": 300, "reserved": 512}


def test_evidence_is_taken_once(pretended: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretended.device, "proof", lambda work: {"allocated": 64})
    model = pretended.model
    monkeypatch.undo()
    assert pretended.model is model
    assert pretended.proof == {"allocated": 64}
