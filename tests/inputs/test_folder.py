"""What a model folder must not say: other folders' files, pickled shards, more than its weights can hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from harness.core.errors import BadFile
from harness.inputs.models import folder as weightfiles


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    (tmp_path / "tokenizer.json").write_text("{}")
    save_file({"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def check(folder: Path) -> None:
    weightfiles.check_folder(folder, "model 'x'", allow_pickle=False, trust_remote_code=False)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "pytorch_model.bin", "x.safetensors", 3, None])
def test_an_index_names_nothing_but_shards(folder: Path, name: object) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BadFile, match="which is no shard's name"):
        check(folder)


@pytest.mark.parametrize("key", ["n_layer", "num_experts", "num_labels"])
def test_counts_beyond_reason_are_refused_before_anything_is_built(folder: Path, key: str) -> None:
    check(folder)
    (folder / "config.json").write_text(json.dumps({"text_config": {key: 10**9}}))
    with pytest.raises(BadFile, match=f"{key} = 1e\\+09, more than any model has"):
        check(folder)


def test_more_layers_than_tensors_are_refused(folder: Path) -> None:
    weightfiles.require_layers(folder, 2, allow_pickle=False)
    for layers in (3, None, "2"):
        with pytest.raises(BadFile, match="its weights 2 tensors"):
            weightfiles.require_layers(folder, layers, allow_pickle=False)


def test_more_parameters_than_bytes_are_refused(folder: Path) -> None:
    size = (folder / "model.safetensors").stat().st_size
    weightfiles.require_parameters(folder, "x", size, allow_pickle=False)
    with pytest.raises(BadFile, match="parameters, its weights have"):
        weightfiles.require_parameters(folder, "x", size + 1, allow_pickle=False)


@pytest.mark.parametrize("header", [b"[]", b'{"a": 1}', b'{"a": {}}', b'{"a": {"data_offsets": []}}', b"[" * 9999])
def test_a_header_without_places_is_refused(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(BadFile, match="copy or download it again"):
        check(folder)


def test_a_stamp_changes_with_any_file(folder: Path) -> None:
    before = weightfiles.stamp(folder)
    assert weightfiles.stamp(folder) == before
    (folder / "new.json").write_text("{}")
    assert weightfiles.stamp(folder) != before
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert weightfiles.stamp(folder) != before
