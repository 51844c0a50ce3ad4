"""What methods of optional libraries share, with a library made up here."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.__main__ import main
from harness.cases import test_contracts as promises
from harness.cases.test_contracts import Candidate
from harness.core import catalog
from harness.core.contracts import Method, Parameter
from harness.core.errors import IncompleteQuantization
from harness.core.specification import parse
from harness.inputs.models import checkpoints
from harness.methods.quantizing import arguments
from harness.methods.quantizing.weight_method import as_linear, layer_method
from harness.metrics.measuring import census
from harness.run import plan

OPTIONAL = {
    "torchao-int8": "torchao",
    "torchao-int8-dynamic": "torchao",
    "torchao-int4": "torchao",
    "quanto-int8": "optimum-quanto",
    "quanto-int4": "optimum-quanto",
    "hqq-int4": "hqq",
    "llmc-gptq-int4": "llmcompressor",
    "llmc-awq-int4": "llmcompressor",
}


class Layer(nn.Module):
    """Int8 codes of a Linear."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        scale = layer.weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("codes", (layer.weight / scale).round().char())
        self.register_buffer("scale", scale)

    def read(self) -> Tensor:
        return self.get_buffer("codes").float() * self.get_buffer("scale")

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.read(), self.bias)


def tensors(layer: Any) -> list[Tensor]:
    return [layer.codes, layer.scale]


def method_of(build: Any, read: Any = Layer.read, name: str = "made-up", requires: tuple[str, ...] = ()) -> Method:
    return layer_method(name=name, summary="", bits=8, requires=requires, replace=build, tensors=tensors, read=read)


METHOD = method_of(Layer, requires=("numpy",))


@pytest.mark.parametrize("architecture", promises.ARCHITECTURES)
def test_a_library_s_method_keeps_the_contract(architecture: str, tmp_path: Path) -> None:
    candidate = Candidate(METHOD, promises.checkpoint(architecture, tmp_path))
    for check in promises.CHECKS:
        check(candidate)
    kinds = {weight.kind for weight in METHOD.quantized(candidate.load())}
    assert kinds == {"Conv1D" if architecture == "gpt2" else "Linear"}
    part = arguments.resolve(parse("made-up:mlp:layers=1"), METHOD, "cpu")
    assert all(".1." in name for name in METHOD.targets(candidate.sketch(), part))


def test_modules_that_a_library_leaves_out_are_an_error(tmp_path: Path) -> None:
    def lazy(layer: nn.Linear) -> nn.Module:
        return Layer(layer) if layer.out_features != 128 else nn.Linear(64, 128, bias=False)

    method = method_of(lazy, name="lazy")
    candidate = Candidate(method, promises.checkpoint("llama", tmp_path))
    model: Any = candidate.load()
    for module in model.modules():
        if type(module) is nn.Linear and "original_kind" in vars(module):
            del module.original_kind
    original = dict(candidate.sketch().named_modules())
    with pytest.raises(IncompleteQuantization, match="lazy left 4 of 14 modules unquantized"):
        census.census(model, method, candidate.arguments, original)


def test_a_library_may_write_into_a_layer_and_keeps_no_graph_of_it(tmp_path: Path) -> None:
    class Writing(Layer):
        def __init__(self, layer: nn.Linear) -> None:
            layer.weight.mul_(1.0)
            super().__init__(layer)
            self.graph = layer.weight.abs().amax().grad_fn

    model = Candidate(method_of(Writing), promises.checkpoint("llama", tmp_path)).load()
    assert [one.graph for one in model.modules() if isinstance(one, Writing)] == [None] * 14


def test_codes_that_a_library_keeps_as_parameters_are_not_counted_as_left(tmp_path: Path) -> None:
    class Kept(Layer):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__(layer)
            codes = self.get_buffer("codes")
            del self._buffers["codes"]
            self.register_parameter("codes", nn.Parameter(codes, requires_grad=False))

        def read(self) -> Tensor:
            return self.get_parameter("codes").float() * self.get_buffer("scale")

    found = []
    for method in (method_of(Layer), method_of(Kept, Kept.read)):
        candidate = Candidate(method, promises.checkpoint("llama", tmp_path))
        original = dict(candidate.sketch().named_modules())
        found.append(census.census(candidate.load(), method, candidate.arguments, original))
    assert found[0]["left_elements"] == found[1]["left_elements"]
    assert found[0]["elements"] == found[1]["elements"]


def test_a_conv1d_becomes_the_equal_linear(tmp_path: Path) -> None:
    model: Any = checkpoints.open_model(promises.checkpoint("gpt2", tmp_path), "fp32", "cpu")
    layer = model.transformer.h[0].attn.c_attn
    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(as_linear(layer)(x), layer(x))


def test_every_optional_method_is_listed_but_not_planned_by_default() -> None:
    known = catalog.methods()
    assert {name: known[name].requires for name in OPTIONAL} == {name: (needs,) for name, needs in OPTIONAL.items()}
    assert not set(OPTIONAL) & {method.name for method in known.values() if method.core}


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed here")
def test_predicting_bytes_without_the_library_names_the_pip_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "gpt2", "--method", "torchao-int8"]) == 2
    assert "pip install torchao" in capsys.readouterr().err


def test_a_value_of_an_argument_can_need_a_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    needy = Parameter(str, "dtype", "", ("dtype", "quick"), requires={"quick": "numba"})
    method = replace(catalog.methods()["nf4"], parameters={"compute": needy})
    assert plan.packages(method, {"compute": "quick"}) == {"numba": version("numba")}
    monkeypatch.setattr(plan, "version", absent)
    assert plan.missing_packages(method, {"compute": "quick"}) == ["numba"]
    assert plan.missing_packages(method, {"compute": "dtype"}) == plan.missing_packages(method) == []


def test_our_methods_use_what_compiles_their_loops_and_need_nothing() -> None:
    for name in ("absmax-int8", "nf4", "linear-int4-affine"):
        method = catalog.methods()[name]
        assert method.uses == ("numba",)
        assert plan.packages(method, {"compute": "fused"}) == {}
