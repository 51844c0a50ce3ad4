"""Adapters beside a model: part of its weights for every method, part of its identity, or refused in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cases import test_contracts as promises
from harness.core import catalog
from harness.core.contracts import Checkpoint
from harness.core.errors import BadFile, HarnessError, MissingAsset
from harness.core.identity import identity_of
from harness.core.options import Declared
from harness.core.specification import parse
from harness.inputs.models import adapters, checkpoints, names
from harness.methods.quantizing.arguments import resolve

RANK, ALPHA = 4, 6
MODULES = {
    "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens"),
    "gpt2": ("transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_fc"),  # (in, out), the first square
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def lora(folder: Path, architecture: str, seed: int = 0, **settings: Any) -> dict[str, torch.Tensor]:
    """Puts an adapter into a model's folder, as peft saves it; returns what it adds to each weight."""
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    added: dict[str, torch.Tensor] = {}
    for module in MODULES[architecture]:
        shape = weights[f"{module}.weight"].shape
        turned, embedding = architecture == "gpt2", module.endswith("embed_tokens")
        out, into = reversed(shape) if turned or embedding else shape
        low, high = torch.randn(RANK, into, generator=generator), torch.randn(out, RANK, generator=generator)
        name = f"base_model.model.{module}.lora_"
        if embedding:
            tensors |= {f"{name}embedding_A": low, f"{name}embedding_B": high}
        else:
            tensors |= {f"{name}A.weight": low, f"{name}B.weight": high}
        product = high @ low * (ALPHA / (math.sqrt(RANK) if settings.get("use_rslora") else RANK))
        added[f"{module}.weight"] = product.T if turned or embedding else product
    save_file(tensors, folder / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "fan_in_fan_out": architecture == "gpt2"}
    more = {"target_modules": ["q_proj"], "bias": "none", "use_dora": False, "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps({**stated, **more, **settings}))
    return added


def read(folder: Path, **allowed: Any) -> Checkpoint:
    return checkpoints.materialise(parse(f"path:{folder}"), Declared(folder.parent), **allowed)


def state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return dict(checkpoints.open_model(checkpoint, "fp32", "cpu").state_dict())


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": ALPHA}}])
@pytest.mark.parametrize("architecture", MODULES)
def test_it_becomes_part_of_the_weights(
    architecture: str, settings: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    promises.checkpoint(architecture, tmp_path / "model")
    plain = read(tmp_path / "model")
    before = state(plain)
    added = lora(tmp_path / "model", architecture, **settings)
    found = read(tmp_path / "model")
    after = state(found)
    assert len(added) == len(MODULES[architecture])
    for name, weight in before.items():
        changed = added.get("model.embed_tokens.weight" if name == "lm_head.weight" else name)  # tied
        torch.testing.assert_close(after[name], weight if changed is None else weight + changed, rtol=1e-6, atol=1e-6)
    assert "the LoRA adapter beside its weights was merged into them" in found.note
    assert found.identity["adapter.r"] == str(RANK)
    assert identity_of(found) != identity_of(plain)
    assert read(tmp_path / "model") == found
    lora(tmp_path / "model", architecture, seed=1, **settings)
    assert identity_of(read(tmp_path / "model")) != identity_of(found)


def test_every_method_computes_with_it(tmp_path: Path, cache: Path) -> None:
    promises.checkpoint("llama", tmp_path / "model")
    lora(tmp_path / "model", "llama")
    found = read(tmp_path / "model")
    exact = promises.logits(checkpoints.open_model(found, "fp32", "cpu"))
    for name in ("absmax-int8", "gguf-q8_0"):
        method = catalog.methods()[name]
        close = promises.logits(method.load(found, resolve(parse(name), method, "cpu"), "cpu"))
        assert (close - exact).norm() < 0.05 * exact.norm(), name


def test_whole_tensors_take_the_place_of_the_model_s(tmp_path: Path, cache: Path) -> None:
    promises.checkpoint("llama", tmp_path / "model")
    lora(tmp_path / "model", "llama")
    tensors = load_file(tmp_path / "model" / "adapter_model.safetensors")
    norm = torch.full((64,), 3.0)
    tensors["base_model.model.model.norm.modules_to_save.weight"] = norm
    save_file(tensors, tmp_path / "model" / "adapter_model.safetensors")
    assert torch.equal(state(read(tmp_path / "model"))["model.norm.weight"], norm)


def test_a_quantized_model_is_unpacked_first(tmp_path: Path, cache: Path) -> None:
    plain = promises.checkpoint("llama", tmp_path / "plain")
    method = catalog.methods()["bnb-nf4"]
    model: Any = method.load(plain, resolve(parse("bnb-nf4"), method, "cpu"), "cpu")
    model.save_pretrained(tmp_path / "packed")
    checkpoints.tokenizer(plain).save_pretrained(tmp_path / "packed")
    before = state(read(tmp_path / "packed"))
    added = lora(tmp_path / "plain", "llama")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "plain" / name).rename(tmp_path / "packed" / name)
    after = read(tmp_path / "packed")
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(state(after)[name], before[name] + added[name])
    assert "stored by bitsandbytes (nf4)" in after.note
    assert "the LoRA adapter" in after.note
    assert not list((cache / "checkpoints").glob(".*"))


def tensors_of(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
SPOILT: dict[str, Callable[[Path], Any]] = {
    "use_dora = True, which is not merged here: merge it": lambda at: lora(at, "llama", use_dora=True),
    "init_lora_weights = pissa": lambda at: lora(at, "llama", init_lora_weights="pissa"),
    "of_tomorrow = 1, which is not merged here": lambda at: lora(at, "llama", of_tomorrow=1),
    "an adapter of the kind 'IA3' beside it": lambda at: lora(at, "llama", peft_type="IA3"),
    "has the expression": lambda at: lora(at, "llama", alpha_pattern={"(q|k)_proj": 2}),
    "has the lora_alpha 'many'": lambda at: lora(at, "llama", lora_alpha="many"),
    "no pair of matrices for model.layers.0": lambda at: tensors_of(at, lambda found: found.pop(f"{Q}B.weight")),
    "do not fit each other": lambda at: tensors_of(at, lambda found: found.update({f"{Q}A.weight": torch.ones(3, 64)})),
    "make another shape": lambda at: tensors_of(at, lambda found: found.update({f"{Q}A.weight": torch.ones(RANK, 65)})),
    "which is not merged here: merge": lambda at: tensors_of(
        at, lambda found: found.update({f"{Q}magnitude_vector": torch.ones(64)})
    ),
    "which the weights do not have": lambda at: tensors_of(
        at, lambda found: found.update({"base_model.model.elsewhere.weight": torch.ones(64)})
    ),
    "replaces model.norm.weight by another shape": lambda at: tensors_of(
        at, lambda found: found.update({"base_model.model.model.norm.weight": torch.ones(65)})
    ),
    "without its adapter_model.safetensors": lambda at: (at / "adapter_model.safetensors").unlink(),
    "where its header promises": lambda at: (at / "adapter_model.safetensors").write_bytes(
        (at / "adapter_model.safetensors").read_bytes()[:-8]
    ),
    "allow them with --allow-pickle": lambda at: (at / "adapter_model.safetensors").rename(at / "adapter_model.bin"),
}


@pytest.mark.parametrize("line", SPOILT)
def test_what_cannot_be_merged_is_one_line(line: str, tmp_path: Path, cache: Path) -> None:
    promises.checkpoint("llama", tmp_path / "model")
    lora(tmp_path / "model", "llama")
    SPOILT[line](tmp_path / "model")
    with pytest.raises(HarnessError) as caught:
        read(tmp_path / "model")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_matrices_where_they_are_allowed(tmp_path: Path, cache: Path) -> None:
    promises.checkpoint("llama", tmp_path / "model")
    lora(tmp_path / "model", "llama")
    wanted = state(read(tmp_path / "model"))
    tensors = load_file(tmp_path / "model" / "adapter_model.safetensors")
    (tmp_path / "model" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "model" / "adapter_model.bin")
    found = state(read(tmp_path / "model", allow_pickle=True))
    assert all(torch.equal(weight, found[name]) for name, weight in wanted.items())
    torch.save(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()  # the model itself is pickled too
    found = state(read(tmp_path / "model", allow_pickle=True))
    assert all(torch.equal(weight, found[name]) for name, weight in wanted.items())
    assert not list((cache / "checkpoints").glob(".*"))


def test_an_adapter_without_its_model_says_so(tmp_path: Path) -> None:
    promises.checkpoint("llama", tmp_path / "model")
    lora(tmp_path / "model", "llama")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(MissingAsset, match="is an adapter without its model: copy it into that model"):
        names.locate(parse(f"path:{tmp_path}/model"), Declared(tmp_path))


def test_older_names_of_the_model_s_tensors_are_found() -> None:
    there = ["h.0.attn.c_proj.weight", "wte.weight"]
    assert adapters._place("transformer.h.0.attn.c_proj.weight", there, "m") == there[0]
    assert adapters._place("wte.weight", ["transformer.wte.weight"], "m") == "transformer.wte.weight"
    with pytest.raises(BadFile, match="which the weights do not have"):
        adapters._place("c_proj.weight", [*there, "h.1.attn.c_proj.weight"], "m")
