"""The contract that plugins are held to, kept by every method of the harness, and broken by methods that break it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.cases import test_contracts as promises
from harness.cases.test_contracts import ARCHITECTURES, CHECKS, Candidate
from harness.core import catalog
from harness.core.contracts import Checkpoint, Method
from harness.methods.quantizing.weight_method import weight_method
from harness.run import plan

METHODS = [item.value for item in catalog.listed_methods().values() if item.own]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("contract")
    return {name: promises.checkpoint(name, folder / name) for name in ARCHITECTURES}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_keeps_it(
    method: Method, architecture: str, sources: dict[str, Checkpoint], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing := plan.missing_packages(method):
        pytest.skip(f"missing: pip install {' '.join(missing)}")
    for check in CHECKS:
        if check is promises.save_and_load and not method.reloads:
            continue
        check(Candidate(method, sources[architecture]))


def quantize(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax() / 127
    return {"codes": (weight / scale).round().char(), "scale": scale}


def dequantize(stored: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    return stored["codes"].float() * stored["scale"]


GOOD = weight_method(name="good", summary="", bits=8, quantize=quantize, dequantize=dequantize)


def noisy(weight: Tensor) -> dict[str, Tensor]:
    noise = 0.01 * torch.randn(weight.shape, device=weight.device)
    return quantize(weight + noise)


def coarse(weight: Tensor) -> dict[str, Tensor]:
    return quantize((weight / 0.2).round() * 0.2 + 1e-9)


def turned(stored: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    return dequantize(stored, shape).flip(0).half().float() * float("nan")


def fat(weight: Tensor) -> dict[str, Tensor]:
    return quantize(weight) | ({} if weight.is_meta else {"more": torch.zeros(3)})


def forgetful(method: Method) -> Method:
    """Keeps its scale outside the state_dict."""

    def load(*given: Any) -> Any:
        model = method.load(*given)
        for module in model.modules():
            if "scale" in module._buffers:
                module._non_persistent_buffers_set.add("scale")
                module.get_buffer("scale").mul_(1 + 0.2 * len(LOADED))
        LOADED.append(1)
        return model

    return dataclasses.replace(method, load=load)


LOADED: list[int] = []


def variant(**changes: Any) -> Method:
    return weight_method(
        **{"name": "bad", "summary": "", "bits": 8, "quantize": quantize, "dequantize": dequantize, **changes}
    )


BROKEN: dict[str, tuple[Method, Callable[[Candidate], None], str]] = {
    "noise": (variant(quantize=noisy), promises.determinism, "two loads of one checkpoint give different logits"),
    "coarse": (variant(quantize=coarse), promises.error_falls_as_bits_grow, "weights err by"),
    "nan": (variant(dequantize=turned), promises.shape_and_dtype, "not finite"),
    "bytes": (variant(quantize=fat), promises.census, "predicted by its sketch"),
    "lazy": (
        dataclasses.replace(GOOD, sketch=lambda *_: None, load=lambda *given: plain(*given)),
        promises.census,
        "unquantized",
    ),
    "training": (
        dataclasses.replace(GOOD, load=lambda *given: GOOD.load(*given).train()),
        promises.shape_and_dtype,
        "tra",
    ),
    "forgetful": (forgetful(GOOD), promises.save_and_load, "restored from its state_dict"),
}


def plain(checkpoint: Checkpoint, arguments: Any, device: str) -> Any:
    from harness.inputs.models import checkpoints

    return checkpoints.open_model(checkpoint, arguments.dtype, device)


@pytest.mark.parametrize("fault", BROKEN)
def test_what_breaks_it_is_told(fault: str, sources: dict[str, Checkpoint]) -> None:
    method, check, message = BROKEN[fault]
    check(Candidate(GOOD, sources["llama"]))
    with pytest.raises(AssertionError, match=message):
        check(Candidate(method, sources["llama"]))
