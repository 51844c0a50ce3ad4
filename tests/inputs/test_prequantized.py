"""Checkpoints that are quantized already, as models."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.cases import test_contracts as promises
from harness.core import catalog
from harness.core.contracts import Checkpoint
from harness.core.errors import HarnessError, MissingPackage
from harness.core.options import Declared
from harness.core.specification import parse
from harness.inputs.models import checkpoints, folder, names
from harness.methods.quantizing.arguments import resolve


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    return promises.logits(checkpoints.open_model(checkpoint, "fp32", "cpu"))


@pytest.mark.parametrize(("architecture", "stated"), [("llama", True), ("gpt2", True), ("gpt2", False)])
@pytest.mark.parametrize("method", ["bnb-nf4", "bnb-int8"])
def test_bitsandbytes_serialized(architecture: str, method: str, stated: bool, tmp_path: Path, cache: Path) -> None:
    """Saved by transformers, read back as the fp32 numbers that its codes stand for; with `quant_method` or not."""
    plain = promises.checkpoint(architecture, tmp_path / "plain")
    chosen = catalog.methods()[method]
    arguments = resolve(parse(method), chosen, "cpu")
    model: Any = chosen.load(plain, arguments, "cpu")
    expected = {weight.name: weight.dequantize() for weight in chosen.quantized(model)}
    model.save_pretrained(tmp_path / "packed")
    if not stated:
        config = json.loads((tmp_path / "packed" / "config.json").read_text())
        del config["quantization_config"]["quant_method"]
        (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    checkpoints.tokenizer(plain).save_pretrained(tmp_path / "packed")
    said: list[str] = []
    found = checkpoints.materialise(parse(f"path:{tmp_path}/packed"), Declared(tmp_path), say=said.append)
    state = checkpoints.open_model(found, "fp32", "cpu").state_dict()
    assert len(expected) == (8 if architecture == "gpt2" else 14)
    for name, weight in expected.items():
        near = 2e-3 if method == "bnb-int8" else 1e-6
        torch.testing.assert_close(state[f"{name}.weight"], weight, rtol=0, atol=near)
    norm = "transformer.ln_f.weight" if architecture == "gpt2" else "model.norm.weight"
    assert torch.equal(state[norm], checkpoints.open_model(plain, "fp32", "cpu").state_dict()[norm])
    assert "weights were stored by bitsandbytes" in found.note
    assert said == [f"unpacking the quantized path:{tmp_path}/packed to fp32 (once)"]
    assert not hasattr(checkpoints.read_config(found), "quantization_config")
    again = checkpoints.materialise(parse(f"path:{tmp_path}/packed"), Declared(tmp_path), say=said.append)
    assert again == found
    assert len(said) == 1


def test_other_kinds_are_refused_and_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promises.checkpoint("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def write(kind: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": kind}}))

    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(HarnessError, match="does not say by what"):
        names.locate(parse(f"path:{tmp_path}"), Declared(tmp_path))
    write("hqq")
    with pytest.raises(HarnessError, match="quantized already, by 'hqq', which is not read here"):
        names.locate(parse(f"path:{tmp_path}"), Declared(tmp_path))
    write("compressed-tensors")

    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(folder, "distribution", absent)
    with pytest.raises(MissingPackage, match="pip install compressed-tensors"):
        names.locate(parse(f"path:{tmp_path}"), Declared(tmp_path))


def test_compressed_tensors(tmp_path: Path, cache: Path) -> None:
    """Int4 in groups, packed by the library itself."""
    compressed_tensors = pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    plain = promises.checkpoint("llama", tmp_path / "plain")
    model: Any = checkpoints.open_model(plain, "fp32", "cpu")
    weights = compressed_tensors.quantization.QuantizationArgs(
        num_bits=4, strategy="group", group_size=32, symmetric=True
    )
    scheme = compressed_tensors.quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    config = compressed_tensors.quantization.QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head"], format="pack-quantized", quantization_status="compressed"
    )
    compressed_tensors.quantization.apply_quantization_config(model, config)
    expected = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.data.unflatten(1, (-1, 32))
            scale = groups.abs().amax(dim=2, keepdim=True) / 7.5
            module.weight_scale.data = scale[..., 0]
            expected[name] = ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)
    compressor = compressed_tensors.compressors.ModelCompressor.from_pretrained_model(
        model, quantization_format="pack-quantized"
    )
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "packed")
    compressor.update_config(tmp_path / "packed")
    checkpoints.tokenizer(plain).save_pretrained(tmp_path / "packed")
    found = checkpoints.materialise(parse(f"path:{tmp_path}/packed"), Declared(tmp_path))
    state = checkpoints.open_model(found, "fp32", "cpu").state_dict()
    assert len(expected) == 14
    for name, weight in expected.items():
        torch.testing.assert_close(state[f"{name}.weight"], weight, rtol=0, atol=1e-5)
    assert "compressed-tensors (pack-quantized)" in found.note


def test_a_config_that_says_so_of_plain_weights_is_told(tmp_path: Path, cache: Path) -> None:
    promises.checkpoint("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(HarnessError, match="says that it is quantized by bitsandbytes, and no weight of it is: take"):
        checkpoints.materialise(parse(f"path:{tmp_path}"), Declared(tmp_path))
