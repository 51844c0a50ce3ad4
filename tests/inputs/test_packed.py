"""Checkpoints of GPTQ, AWQ and FP8, packed here as their libraries lay them out, read back as what they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cases import test_contracts as promises
from harness.core.errors import BadFile
from harness.core.options import Declared
from harness.core.specification import parse
from harness.inputs.models import checkpoints, packed

GROUP = 32
Packed = tuple[dict[str, torch.Tensor], torch.Tensor]  # parts by the ends of their names, and the matrix (out, in)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def words(codes: torch.Tensor, bits: int, order: tuple[int, ...]) -> torch.Tensor:
    """(..., n) codes, a word of 32 bits for every 32/bits of the last dimension, the order[j]-th at bit j * bits."""
    found = torch.zeros(*codes.shape[:-1], codes.shape[-1] // len(order), dtype=torch.int64)
    for place, column in enumerate(order):
        found |= codes[..., column :: len(order)].long() << (bits * place)
    return torch.where(found >= 2**31, found - 2**32, found).int()


def drawn(shape: torch.Size, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (in, out), zeros and scales (groups, out)."""
    out, into = shape
    codes = torch.randint(0, 2**bits, (into, out))
    return codes, torch.randint(1, 2**bits, (into // GROUP, out)), torch.rand(into // GROUP, out).half() / 2**bits


def by_gptq(shape: torch.Size, bits: int = 4, less: int = 1, acts: bool = False) -> Packed:
    codes, zeros, scales = drawn(shape, bits)
    order = tuple(range(32 // bits))
    group = torch.arange(shape[1]) // GROUP
    group = group[torch.randperm(len(group))] if acts else group
    parts = {
        "qweight": words(codes.T, bits, order).T.contiguous(),
        "qzeros": words(zeros - less, bits, order),
        "scales": scales,
        "g_idx": group.int(),
    }
    return parts, ((codes - zeros[group]) * scales.float()[group]).T


def by_awq(shape: torch.Size) -> Packed:
    codes, zeros, scales = drawn(shape, 4)
    parts = {
        "qweight": words(codes, 4, packed.AWQ_ORDER),
        "qzeros": words(zeros, 4, packed.AWQ_ORDER),
        "scales": scales,
    }
    group = torch.arange(shape[1]) // GROUP
    return parts, ((codes - zeros[group]) * scales.float()[group]).T


def by_fp8(shape: torch.Size) -> Packed:
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 48), -(-shape[1] // 40))
    whole = scale.repeat_interleave(48, 0).repeat_interleave(40, 1)[: shape[0], : shape[1]]
    return {"weight": weight, "weight_scale_inv": scale}, weight.float() * whole


KINDS: dict[str, tuple[dict[str, Any], Callable[[torch.Size], Packed]]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP}, by_gptq),
    "gptq of 8 bits": ({"quant_method": "gptq", "bits": 8}, lambda shape: by_gptq(shape, bits=8)),
    "gptq of 2 bits": ({"quant_method": "gptq", "bits": 2}, lambda shape: by_gptq(shape, bits=2)),
    "gptq by activation": ({"quant_method": "gptq", "bits": 4}, lambda shape: by_gptq(shape, acts=True)),
    "gptq, version 2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        lambda shape: by_gptq(shape, less=0),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, by_awq),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [48, 40]}, by_fp8),
}


def write(folder: Path, architecture: str, kind: str) -> dict[str, torch.Tensor]:
    """Packs the layers' matrices of a small model; returns them, (out, in)."""
    settings, pack = KINDS[kind]
    promises.checkpoint(architecture, folder)
    torch.manual_seed(0)
    state, wanted = load_file(folder / "model.safetensors"), {}
    for name in sorted(state):
        if ".layers." in name or (".h." in name and name.endswith(".weight")):
            if state[name].dim() == 2:
                shape = state[name].T.shape if architecture == "gpt2" else state[name].shape
                parts, wanted[name] = pack(shape)
                del state[name]
                state |= {f"{name.removesuffix('weight')}{end}": part for end, part in parts.items()}
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return wanted


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_become_the_numbers_they_stand_for(architecture: str, kind: str, tmp_path: Path, cache: Path) -> None:
    wanted = write(tmp_path / "model", architecture, kind)
    found = checkpoints.materialise(parse(f"path:{tmp_path}/model"), Declared(tmp_path))
    state = checkpoints.open_model(found, "fp32", "cpu").state_dict()
    assert len(wanted) == (8 if architecture == "gpt2" else 14)
    for name, weight in wanted.items():
        torch.testing.assert_close(state[name].T if architecture == "gpt2" else state[name], weight, rtol=0, atol=0)
    assert f"weights were stored by {kind[:4].strip()}" in found.note
    assert not hasattr(checkpoints.read_config(found), "quantization_config")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"quant_method": "gptq", "bits": 3}, "has codes of 3 bits; 2, 4, 8 are read"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ's version gemv; gemm is read"),
        ({"quant_method": "awq", "bits": 4}, "is packed in a way that is not read"),
        ({"quant_method": "fp8"}, "says that it is quantized by fp8, and no weight of it is"),
    ],
)
def test_what_is_packed_otherwise_is_one_line(
    settings: dict[str, Any], match: str, tmp_path: Path, cache: Path
) -> None:
    write(tmp_path / "model", "llama", "gptq")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(BadFile, match=match):
        checkpoints.materialise(parse(f"path:{tmp_path}/model"), Declared(tmp_path))


def test_the_first_gptq_files_say_so_beside_their_config(tmp_path: Path, cache: Path) -> None:
    wanted = write(tmp_path / "model", "llama", "gptq")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": GROUP}))
    found = checkpoints.materialise(parse(f"path:{tmp_path}/model"), Declared(tmp_path))
    state = checkpoints.open_model(found, "fp32", "cpu").state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in wanted.items())
    assert not (found.directory / "quantize_config.json").exists()
    told = {"bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"}  # other numbers from the same codes
    (tmp_path / "model" / "quantize_config.json").write_text(json.dumps(told))
    other = checkpoints.materialise(parse(f"path:{tmp_path}/model"), Declared(tmp_path))
    assert (other.directory != found.directory, other.identity != found.identity) == (True, True)


def test_pickled_codes_are_read_where_they_are_allowed(tmp_path: Path, cache: Path) -> None:
    wanted = write(tmp_path / "model", "llama", "gptq")
    state = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    homes = {name: f"pytorch_model-0000{1 + place % 2}-of-00002.bin" for place, name in enumerate(state)}
    for file in set(homes.values()):
        torch.save({name: state[name] for name in state if homes[name] == file}, tmp_path / "model" / file)
    (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": homes}))
    found = checkpoints.materialise(parse(f"path:{tmp_path}/model"), Declared(tmp_path), allow_pickle=True)
    assert sorted(path.name for path in found.directory.glob("*model*")) == ["model.safetensors"]
    state = checkpoints.open_model(found, "fp32", "cpu").state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in wanted.items())
