"""Bytes counted by hand: tied and shared storages, state outside parameters, subclasses; the metric's figures."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from harness.inputs.models import sizes
from harness.metrics.memory import METRIC
from harness.metrics.memory import __doc__ as specification

MEMBERS = {member.name: member for member in METRIC.members}


class Wrapped(torch.Tensor):
    """A quantized tensor as libraries write one: a shell without bytes around two real tensors."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> "Wrapped":
        shell: Wrapped = torch.Tensor._make_wrapper_subclass(cls, (4, 8), dtype=torch.float32)
        shell.codes, shell.scale = codes, scale
        return shell

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:  # nn.Parameter detaches what it is given
            return Wrapped(args[0].codes, args[0].scale)
        raise NotImplementedError(func)


class State:
    """What bitsandbytes hangs on a parameter: nested, with tensors in attributes."""

    def __init__(self, device: str, nested: Any = None) -> None:
        self.absmax = torch.zeros(5, device=device)  # 20 bytes
        self.shape = torch.Size((4, 3))
        self.nested = nested


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parameters_buffers_and_state(device: str) -> None:
    model: Any = nn.Linear(3, 4, device=device)  # 48 + 16
    model.register_buffer("table", torch.zeros(5, dtype=torch.int8, device=device))  # 5
    assert sizes.measure(model) == {"memory.parameters": 64, "memory.footprint": 69, "memory.storage": 69}
    model.weight.quant_state = State(device, nested=State(device))  # 20 + 20
    model.meta = {"scale": [torch.zeros(2, dtype=torch.float16, device=device)]}  # 4
    model.loose = torch.zeros(1, device=device)  # 4
    assert sizes.measure(model) == {"memory.parameters": 64, "memory.footprint": 69, "memory.storage": 117}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_storage_counts_once(device: str) -> None:
    model: Any = nn.Sequential(nn.Embedding(6, 4, device=device), nn.Linear(4, 6, bias=False, device=device))  # 96 each
    assert sizes.storage_bytes(model) == 192
    model[1].weight = model[0].weight
    model.alias = model[0].weight.data  # the same storage through another tensor
    model.part = model.alias[2:]  # a view keeps the whole alive, and adds nothing
    assert sizes.measure(model) == {"memory.parameters": 96, "memory.footprint": 96, "memory.storage": 96}


def test_a_view_counts_what_it_keeps_alive() -> None:
    assert sizes.bytes_of([torch.zeros(10)[:2]]) == 40


def test_tensor_subclass_counts_its_parts() -> None:
    model: Any = nn.Module()
    codes, scale = torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(4)
    model.weight = nn.Parameter(Wrapped(codes, scale), requires_grad=False)
    assert sizes.storage_bytes(model) == 16 + 16


def test_scratch_of_the_last_input_is_not_storage() -> None:
    import bitsandbytes

    model: Any = nn.Linear(1, 1, bias=False)
    model.state = bitsandbytes.MatmulLtState()
    model.state.idx = torch.zeros(7, dtype=torch.int64)
    assert sizes.storage_bytes(model) == 4
    model.state.SCB = torch.zeros(2)
    assert sizes.storage_bytes(model) == 12


def test_walking_a_cycle_ends() -> None:
    model: Any = nn.Linear(1, 1, bias=False)
    holder: dict[str, Any] = {"model": model, "scale": torch.zeros(3)}
    holder["self"] = holder
    model.holder = holder
    assert sizes.storage_bytes(model) == 4 + 12


def test_the_metrics_members() -> None:
    exact = [name for name, member in MEMBERS.items() if member.exact]
    assert exact == ["memory.parameters", "memory.footprint", "memory.storage"]
    assert list(MEMBERS) == [
        *exact,
        *("memory.storage_after", "memory.load_peak", "memory.run_peak", "memory.file"),
    ]
    assert {(member.unit, member.better, member.textual) for member in METRIC.members} == {("B", "lower", False)}
    assert all(f"`{name}`" in str(specification) for name in MEMBERS)


class Model(nn.Module):
    """Records the shape of what it is fed; its first forward adds two bytes of state."""

    def __init__(self, context: int, log: list[Any]) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=5, max_position_embeddings=context)
        self.log = log
        self.state: dict[str, torch.Tensor] = {}

    def forward(self, ids: torch.Tensor, use_cache: bool) -> None:
        assert torch.is_inference_mode_enabled()
        assert not use_cache
        assert int(ids.max()) < self.config.vocab_size
        self.log.append(tuple(ids.shape))
        self.state["repacked"] = torch.zeros(2, dtype=torch.uint8)


class Device:
    torch_device = torch.device("cpu")

    def __init__(self, log: list[Any], peak: dict[str, int], note: str = "") -> None:
        self.log, self._peak, self.peak_note = log, peak, note

    def reset_peak(self) -> None:
        self.log.append("reset")

    def synchronize(self) -> None:
        self.log.append("wait")

    def peak(self) -> dict[str, int]:
        self.log.append("peak")
        return self._peak


def subject(context: int = 2048, note: str = "", **peak: int) -> Any:
    log: list[Any] = []
    return SimpleNamespace(
        model=Model(context, log),
        device=Device(log, peak, note),
        before={"memory.parameters": 10, "memory.footprint": 12, "memory.storage": 20, **peak},
        predicted={"memory.parameters": 10, "memory.footprint": 12, "memory.storage": 19},
        release_reference=lambda: log.append("release"),
        log=log,
    )


def test_exact_members_say_whether_the_prediction_held() -> None:
    figures = {name: METRIC.measure(subject(), MEMBERS[name]) for name in MEMBERS if MEMBERS[name].exact}
    assert [figure.value for figure in figures.values()] == [10, 12, 20]
    assert {figure.unit for figure in figures.values()} == {"B"}
    assert figures["memory.footprint"].detail == {"predicted": 12, "predicted_equal": True}
    assert figures["memory.storage"].detail == {"predicted": 19, "predicted_equal": False}


def test_storage_after_runs_a_forward_first() -> None:
    measured = subject()
    figure = METRIC.measure(measured, MEMBERS["memory.storage_after"])
    assert measured.log == [(1, 8), "wait"]
    assert (figure.value, figure.unit, figure.detail["before"]) == (2, "B", 20)


@pytest.mark.parametrize(("context", "length"), [(2048, 512), (100, 100)])
def test_run_peak_is_of_one_window_without_the_reference(context: int, length: int) -> None:
    measured = subject(context, resident=1 << 20)
    figure = METRIC.measure(measured, MEMBERS["memory.run_peak"])
    assert measured.log == ["release", "reset", (1, length), "wait", "peak"]
    assert (figure.value, figure.unit) == (1 << 20, "B")
    assert figure.detail == {"resident": 1 << 20, "tokens": length}


@pytest.mark.parametrize("member", ["memory.load_peak", "memory.run_peak"])
def test_cuda_peaks_are_allocated_with_the_pool_beside(member: str) -> None:
    figure = METRIC.measure(subject(allocated=300, reserved=512), MEMBERS[member])
    assert figure.value == 300
    assert {name: figure.detail[name] for name in ("allocated", "reserved")} == {"allocated": 300, "reserved": 512}


def test_a_peak_that_could_not_be_reset_says_so() -> None:
    figure = METRIC.measure(subject(note="not resettable", resident=9), MEMBERS["memory.load_peak"])
    assert figure.detail == {"resident": 9, "note": "not resettable"}
