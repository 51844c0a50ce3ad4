"""Without Numba torch quantizes to the same bits and multiplies by the dequantized weight, and the row says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from harness.__main__ import main
from harness.core import catalog, environment
from harness.core.environment import Environment
from harness.core.specification import parse
from harness.core.values import digest
from harness.judge.baselines import world_key
from harness.methods.quantizing import compiled
from harness.methods.quantizing.arguments import resolve
from harness.methods.quantizing.stored import QuantizedLinear
from harness.run import group

OURS = sorted(name for name, method in catalog.methods().items() if "numba" in method.uses)
BLOCKED = """
import sys
sys.modules["numba"] = None  # as where it is not installed
import torch
from tests.methods.test_without_numba import made
torch.save(made(), sys.argv[1])
"""


def made() -> dict[str, dict[str, torch.Tensor]]:
    """What every method of ours stores of one matrix, and makes of few rows and of many."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(1)
    few, many = (torch.randn(rows, 512, generator=generator) for rows in (3, 40))
    for name in OURS:
        method = catalog.methods()[name]
        computes = method.parameters["compute"].choices if "compute" in method.parameters else ("",)
        for compute in computes:
            torch.manual_seed(0)
            model = nn.Module()
            model.layers = nn.ModuleList([nn.Linear(512, 700)])  # more weights than are quantized at once
            given = resolve(parse(f"{name}:compute={compute}" if compute else name), method, "cpu")
            method.sketch(model.requires_grad_(False), given)
            layer = model.layers[0]
            assert isinstance(layer, QuantizedLinear)
            plain = nn.functional.linear(few, layer.weight, layer.bias)
            outputs = {"few": layer(few), "many": layer(many), "plain": plain}
            found[f"{name} {compute}"] = {**model.state_dict(), **outputs}
    return found


def test_torch_gives_the_same_bits(tmp_path: Path) -> None:
    path = tmp_path / "found.pt"
    ran = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(path)], cwd=Path(__file__).parents[2], env=dict(os.environ),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    theirs, ours = torch.load(path), made()
    assert compiled.available()
    assert theirs.keys() == ours.keys()
    for name, found in theirs.items():
        assert found.keys() == ours[name].keys()
        sums = {"few", "many"} if name.endswith("fused") else {"few"}  # of these the order may differ
        for key in found.keys() - sums:
            assert torch.equal(found[key], ours[name][key]), (name, key)
        if name.endswith("bf16"):  # torch rounds sums to it, a loop keeps them in fp32
            torch.testing.assert_close(found["few"], ours[name]["few"], rtol=2**-7, atol=2**-7)
            continue
        for key in sums:
            torch.testing.assert_close(found[key], ours[name][key], rtol=1e-4, atol=1e-4)
        if name.endswith(("dtype", "fused")):  # not rounded, and not the order in which a loop sums
            assert torch.equal(found["few"], found["plain"]), name


def test_the_environment_says_what_runs_the_loops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert group.loaded_facts("cpu")["loops"] == "compiled"
    monkeypatch.setattr(compiled, "available", lambda: False)
    assert group.loaded_facts("cpu")["loops"] == "torch"
    assert main(["doctor"]) == 0
    assert "loops: torch" in capsys.readouterr().out.splitlines()


def test_what_was_recorded_before_is_compiled_and_keeps_its_names() -> None:
    here = environment.capture("cpu", 1)
    before = {key: value for key, value in here.to_dict().items() if key not in environment.LATER}
    assert Environment.from_dict(before) == here
    assert world_key(here) == digest(before)[:12]
    without = Environment.from_dict({**before, "loops": "torch"})
    assert without.id != here.id
    assert without.environment_class != here.environment_class
    assert without.device_class == here.device_class
    assert environment.class_difference(here, without) == "loops: compiled -> torch"
