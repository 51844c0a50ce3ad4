"""What a group does with a model once it is loaded, on a device that is pretended."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from harness.core import catalog
from harness.core.contracts import Window
from harness.core.environment import Environment
from harness.core.errors import HarnessError
from harness.core.options import Declared, Options
from harness.core.records import Case, Figure
from harness.inputs.models import checkpoints, sizes
from harness.metrics.measuring import census, engine
from harness.results.directory import IDENTITIES
from harness.run import group
from harness.run.group import Group, as_stored
from harness.run.messages import UNFIT

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
    found.checkpoint = found.reference_checkpoint = SimpleNamespace(
        specification="m", revision="r", note="", grid="", identity={}
    )
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


@pytest.mark.parametrize("bug", [False, True])
def test_what_cannot_be_had_is_told_with_its_cases(monkeypatch: pytest.MonkeyPatch, bug: bool) -> None:
    class Planned:
        """Where a group stands: it plans every text but one."""

        def __init__(self, job: Any, line: Any) -> None:
            self.inputs = SimpleNamespace(seen={f"weights of {job.model}": "w"})

        def plan_of(self, dataset: str, protocol: str) -> None:
            if protocol == "rolling:64":
                raise KeyError("a bug") if bug else HarnessError("no BOS")

    def of_session(model: str, *more: Any, **also: Any) -> Any:
        if model == "bad":
            raise OSError(errno.EACCES, "Permission denied", "/bad")
        return SimpleNamespace(directory=Path(), identity={"weights": model})

    monkeypatch.setattr(checkpoints, "of_session", of_session)
    monkeypatch.setattr(group, "Group", Planned)
    monkeypatch.setattr(group, "stamp", lambda directory: "s")
    texts = (("", "", "memory.storage"), ("lee", "chunk:64", "perplexity"), ("lee", "rolling:64", "perplexity"))
    cases = [Case(model, "fp32", *text, "cpu") for model in ("bad", "good") for text in texts]
    job: Any = SimpleNamespace(options=Options(Declared(Path())), reference="fp32", threads=1, log=Path())
    said: list[str] = []
    line: Any = SimpleNamespace(send=lambda reply: said.append(reply.text))
    told = group.prepare(job, cases, line)
    assert told.keys() == {"weights of good", "files of good", IDENTITIES, UNFIT}
    assert [case for case, _ in told[UNFIT]] == [*cases[:3], cases[5]]
    assert {reason for _, reason in told[UNFIT][:3]} == {told[UNFIT][0][1]}
    assert "Permission denied" in told[UNFIT][0][1]
    assert told[UNFIT][3][1] == ("KeyError: 'a bug'" if bug else "no BOS")
    assert any(text.startswith("Traceback") and "KeyError: 'a bug'" in text for text in said) == bug


def test_what_groups_take_names_the_folder_of_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "of_session", lambda model, options: SimpleNamespace(directory=Path(f"/{model}")))
    monkeypatch.setattr(group, "group_bytes", lambda case, own, other: 7)
    case = Case("m", "nf4", "", "", "memory.storage", "cpu", "fp32=base")
    told = group.needs(Options(Declared(Path())), [case])
    assert told == {"bytes": {case.group: 7}, "folders": {"m": "/m", "base": "/base"}}


class Words:
    name_or_path = "folder"

    def convert_ids_to_tokens(self, number: int) -> str:
        return f"word {number}"


@pytest.mark.parametrize("kind", ["this reference", "this fp32 reference"])
def test_weights_beside_another_model_became_no_reference(kind: str) -> None:
    note = f"weights were stored as Q4_1 before they became {kind}; an adapter was merged"
    checkpoint: Any = SimpleNamespace(note=note, grid="affine4:32")
    assert as_stored(checkpoint, "affine4:32", alone=True) == {"model_note": note, "grid_aligned": True}
    told = "weights were stored as Q4_1; an adapter was merged"
    assert as_stored(checkpoint, "affine4:32", alone=False) == {"model_note": told, "grid_aligned": False}


def test_ids_beyond_the_embedding_are_named_with_tokenizer_and_model(
    pretended: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = SimpleNamespace(get_input_embeddings=lambda: nn.Embedding(9, 2))
    plan = SimpleNamespace(windows=(Window(np.array([1, 9]), 1), Window(np.array([], dtype=np.int64), 0)))
    monkeypatch.setattr(Group, "plan", plan)
    monkeypatch.setattr(Group, "tokenizer", Words())
    with pytest.raises(
        HarnessError, match="tokenizer in folder reads 'word 9' as 9, and the embedding of m has 9 rows"
    ):
        pretended.refuse_strange_ids(model, "m")
    monkeypatch.setattr(Group, "plan", SimpleNamespace(windows=(Window(np.array([1, 8]), 1),)))
    pretended.refuse_strange_ids(model, "m")


def test_a_model_that_does_not_say_its_embedding_is_measured(pretended: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> None:
        raise NotImplementedError("get_input_embeddings")

    model: Any = SimpleNamespace(get_input_embeddings=unknown)
    monkeypatch.setattr(Group, "plan", SimpleNamespace(windows=(Window(np.array([1, 9]), 1),)))
    pretended.refuse_strange_ids(model, "m")


def test_a_reference_of_another_model_is_checked_under_its_own_name(
    pretended: Group, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    found: Any = pretended
    found.reference_checkpoint = base = SimpleNamespace(specification="base", identity={"weights": "b"})
    found.reference_method, found.reference_id, found.reference_batch = METHOD, "fp32", 1
    found._reference = nn.Linear(2, 2)
    found.case = Case("m", "nf4", "lee", "chunk:9", "perplexity", "cpu", "fp32=base")
    found.inputs = SimpleNamespace(untouched=seen.append)
    found.job.options = SimpleNamespace(report_dir=tmp_path)
    windows = (Window(np.arange(3), 2),)
    monkeypatch.setattr(Group, "plan", SimpleNamespace(windows=windows, protocol_id="p", token_hash="t"))
    monkeypatch.setattr(Group, "world", ())
    monkeypatch.setattr(Group, "score", lambda *given: np.zeros(2, np.float32))
    monkeypatch.setattr(Group, "refuse_strange_ids", lambda self, model, called: seen.append(called))
    ahead = [True, False]
    monkeypatch.setattr(engine, "looks_ahead", lambda *given: ahead.pop(0))
    with pytest.raises(HarnessError, match=r"^base \(Linear\) is no causal model"):
        found.reference_nll()
    assert len(found.reference_nll()) == 2
    assert seen == ["base", "base", base]  # and its files are those that must not have changed


def test_a_bidirectional_reference_is_refused_in_one_line(pretended: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SimpleNamespace(windows=(Window(np.arange(3), 2), Window(np.arange(9), 8)))
    monkeypatch.setattr(Group, "plan", plan)
    asked: list[int] = []

    def ahead(model: nn.Module, ids: Any, device: str) -> bool:
        asked.append(len(ids))
        return True

    monkeypatch.setattr(engine, "looks_ahead", ahead)
    with pytest.raises(HarnessError, match=r"m \(Linear\) is no causal model: a later token moves"):
        pretended.refuse_bidirectional(nn.Linear(2, 2))
    assert asked == [9]
    mixed = nn.Linear(2, 2)
    mixed.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    pretended.refuse_bidirectional(mixed)  # LLM.int8 mixes rows: it would be taken for one that looks ahead
