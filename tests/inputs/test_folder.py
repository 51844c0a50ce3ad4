"""What a model folder must not say: other folders' files, pickled shards, more than its weights can hold."""

from __future__ import annotations

import json
import os
import re
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


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"transformers_weights": "other.safetensors"}, "names weights of its own ('other.safetensors')"),
        ({"attn_implementation": "org/kernel"}, "the kernel 'org/kernel' (attn_implementation)"),
        ({"_attn_implementation_internal": "org/kernel:layer"}, "the kernel 'org/kernel:layer'"),
        ({"text_config": {"attn_implementation": {"": "org/k"}}}, "'org/k' (text_config.attn_implementation.)"),
        ({"per_layer_config": [{"experts_implementation": "org/k"}]}, "the kernel 'org/k'"),
        ({"kernel_config": {"kernel_mapping": {"RMSNorm": "org/k:RMSNorm"}}}, "the kernel 'org/k:RMSNorm'"),
    ],
)
def test_a_config_chooses_no_other_weights_and_no_code_of_the_hub(folder: Path, entry: object, words: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **entry}))  # type: ignore[dict-item]
    with pytest.raises(BadFile, match=re.escape(words)):
        check(folder)


def test_what_a_config_may_say_of_kernels(folder: Path) -> None:
    """Widths, switches and implementations that transformers brings: `open_model` names the attention in any case."""
    harmless = {"conv_kernel": 4, "use_mamba_kernels": True, "attn_implementation": "eager", "_name_or_path": "org/m"}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **harmless}))
    check(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "notes.txt"])
def test_a_pipe_in_a_folder_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(BadFile, match=f"{name} is a pipe or a device"):
        check(folder)


def test_a_built_folder_obeys_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(destination: Path) -> dict[str, str]:
        save_file({"a": np.zeros(4, np.float32)}, destination / "model.safetensors")
        (destination / "model.safetensors").chmod(0o600)
        return {}

    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    before = os.umask(0o002)
    try:
        built, _ = weightfiles.built("tiny-x", build)
    finally:
        os.umask(before)
    assert built.stat().st_mode & 0o777 == 0o775
    assert {path.stat().st_mode & 0o777 for path in built.iterdir()} == {0o664}
