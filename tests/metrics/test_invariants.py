"""The invariants on this environment's libraries, and that each check sees what it is there to see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from harness import judge
from harness.core import catalog, environment
from harness.core.catalog import member_of
from harness.core.options import Options, read_declared
from harness.core.records import Case, Figure, Row
from harness.core.specification import parse
from harness.judge import known_faults
from harness.methods.quantizing import arguments, bnb
from harness.metrics.measuring import invariant_checks
from harness.metrics.measuring.checks import CHECKS, LAYER, Check, metric
from harness.metrics.measuring.devices import open_device
from harness.run.group import Group, loaded_facts
from harness.run.messages import Job

METHODS = ("bnb-int8", "bnb-fp4", "bnb-nf4", "bnb-nf4-dq")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with bnb.quiet():
        yield


def subject(method: str, check: str, model: str = LAYER) -> Any:
    found = catalog.methods()[method]
    case = Case(model, method, "", "", f"invariant.{check}", "cpu")
    resolved = arguments.resolve(parse(method), found, "cpu")
    return SimpleNamespace(case=case, method=found, arguments=resolved, device=open_device("cpu"))


def measured(method: str, check: str) -> Figure:
    one = subject(method, check)
    return catalog.metrics()["invariant"].measure(one, member_of(one.case))


def planned() -> list[tuple[str, str]]:
    return [
        (method, check.name) for method in METHODS for check in CHECKS if check.runs(LAYER, catalog.methods()[method])
    ]


@pytest.mark.parametrize(("method", "check"), planned())
def test_a_layer_holds_or_shows_a_known_fault(method: str, check: str) -> None:
    figure = measured(method, check)
    row = Row.of(subject(method, check).case, value=figure.value, detail=figure.detail)
    world = environment.capture("cpu", torch.get_num_threads(), loaded_facts("cpu"))
    found = known_faults.judge(row, known_faults.load(ROOT / "baselines"), world)
    assert not judge.fails(found, require_baselines=False, allow_missing=False), found.reason


class Wrong(nn.Module):
    """A layer whose output is spoilt."""

    def __init__(self, inner: nn.Module, spoil: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.spoil, self.calls = inner, spoil, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.spoil(self.inner(x), self.calls)


SPOILT: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "product.fp32": lambda y, calls: y * 1.05,
    "product.bf16": lambda y, calls: y * 1.05,
    "product.fp16": lambda y, calls: y * 1.05,
    "scale": lambda y, calls: y * 1.01,
    "rows": lambda y, calls: y + 0.1 * y.norm(dim=1).max() * len(y),
    "run_twice": lambda y, calls: y * (1 + 1e-3 * calls),
    "eval_again": lambda y, calls: y * (1 + 1e-3 * calls),
    "moved": lambda y, calls: y * (1 + 1e-3 * calls),
    "state_dict": lambda y, calls: y * (1 + 1e-3 * calls),
    "shape.64x96": lambda y, calls: y * 1.5,
}


@pytest.mark.parametrize("check", SPOILT)
def test_a_spoilt_layer_does_not_hold(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = invariant_checks.build

    def spoilt(*given: Any, **named: Any) -> nn.Module:
        return Wrong(build(*given, **named), SPOILT[check])

    monkeypatch.setattr(invariant_checks, "build", spoilt)
    assert not measured("bnb-int8", check).detail["holds"]


def test_a_copy_that_is_not_the_same_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    restored = invariant_checks.restored

    def other(one: Any, kept: Any) -> nn.Module:
        return restored(one, {name: value * 0 for name, value in kept.items()})

    assert measured("bnb-int8", "saved_before").detail["holds"]
    monkeypatch.setattr(invariant_checks, "restored", other)
    assert not measured("bnb-int8", "saved_before").detail["holds"]


def test_double_quantization_that_saves_nothing_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured("bnb-nf4-dq", "double_before").detail["holds"]
    plain = invariant_checks.build

    def single(*given: Any, **named: Any) -> nn.Module:
        return plain(*given, **{**named, "method": catalog.methods()["bnb-nf4"]})

    monkeypatch.setattr(invariant_checks, "build", single)
    assert not measured("bnb-nf4-dq", "double_before").detail["holds"]


def test_an_option_that_is_taken_in_silence_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb, "configuration", lambda chosen: None)
    assert not measured("bnb-nf4", "misspelt").detail["holds"]


def test_what_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*given: Any, **named: Any) -> nn.Module:
        raise ValueError("first line\nsecond")

    monkeypatch.setattr(invariant_checks, "build", build)
    assert measured("bnb-nf4", "run_twice").detail == {"holds": False, "exception": "ValueError: first line"}


def test_own_methods_have_checks_on_models_only() -> None:
    ours = catalog.methods()["nf4"]
    assert not any(check.runs(LAYER, ours) for check in CHECKS)
    assert any(check.runs("tiny-gpt2", ours) for check in CHECKS)
    assert not any(Check("x").runs(model, catalog.methods()["fp16"]) for model in (LAYER, "tiny-gpt2"))
    assert metric(CHECKS[0]) == "invariant.product.fp32"


class Pipe:
    """In the place of the controller's pipe."""

    def send(self, reply: Any) -> None:
        pass


METRICS = (
    "memory.storage",
    "memory.storage_after",
    "perplexity",
    "perplexity.delta",
    "divergence.kl",
    "latency.decode",
    "memory.run_peak",
)


@pytest.mark.parametrize("method", ["bnb-int8", "bnb-nf4"])
def test_measuring_asks_for_no_state_and_moves_nothing(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known faults are never triggered by the harness's own measuring."""
    _, declared = read_declared(ROOT)
    options = Options(
        declared, report_dir=tmp_path, max_tokens=512, repetitions=2, datasets=(parse("synthetic"),),
        protocols=(parse("chunk:128"),),
    )  # fmt: skip
    (tmp_path / "nll").mkdir()
    job = Job(options, "tiny-gpt2", method, "cpu", "fp32", torch.get_num_threads(), tmp_path / "log")
    pipe: Any = Pipe()
    group = Group(job, pipe)
    model = group.model  # loading moves and reads as it must: before any forward

    def refused(*given: Any, **named: Any) -> Any:
        raise AssertionError("a state or a move behind a forward")

    reference = group.reference
    for owner in (nn.Module, bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt):
        for name in ("state_dict", "to", "cuda", "cpu"):
            monkeypatch.setattr(owner, name, refused)
    for owner in (bitsandbytes.nn.Params4bit, bitsandbytes.nn.Int8Params):
        for name in ("to", "cuda", "cpu"):
            monkeypatch.setattr(owner, name, refused)
    for name in METRICS:
        text = ("synthetic", "chunk:128") if name.partition(".")[0] in ("perplexity", "divergence") else ("", "")
        case = Case("tiny-gpt2", method, *text, name, "cpu")
        assert group.measure(case).value is not None
    storages = [
        {parameter.untyped_storage().data_ptr() for parameter in (*one.parameters(), *one.buffers())}
        for one in (model, reference)
    ]
    assert not storages[0] & storages[1], "reference and candidate share a tensor"
