"""Model folders, GGUF files and tokenizers from strangers."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from harness.core.contracts import Checkpoint
from harness.core.errors import HarnessError
from harness.inputs.models import adapters, checkpoints
from harness.inputs.models import folder as weightfiles
from harness.inputs.models.gguf_format import architectures, hyperparameters
from harness.inputs.models.gguf_format.file import GgufFile
from harness.inputs.texts import protocols
from studies import tiny
from tests.fuzz.bounds import quick, slow, survives
from tests.fuzz.damage import HOSTILE, altered, damaged, json_values, texts
from tests.gguf_models import NAMED, TENSORS, Shaped, rewritten, stated


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder, untrained."""
    folder = tmp_path_factory.mktemp("sound")
    torch.manual_seed(0)
    model = tiny.untrained("gpt2")
    model.save_pretrained(folder)  # type: ignore[operator]
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "model")
    return tmp_path / "model"


def checked(folder: Path) -> None:
    """What a session looks at before it starts a process."""
    weightfiles.check_folder(folder, "model 'x'", allow_pickle=False, trust_remote_code=False)


def opened(folder: Path) -> None:
    """What a group does with the folder, up to the loaded model."""
    checked(folder)
    checkpoint = Checkpoint("x", folder, "")
    config = checkpoints.read_config(checkpoint)
    protocols.encode(checkpoints.tokenizer(checkpoint), "ba be bi bo")
    checkpoints.modules(checkpoint, config, "fp32")
    checkpoints.open_model(checkpoint, "fp32", "cpu")


@quick
@given(data=st.data())
def test_damaged_headers(copy: Path, sound: Path, data: st.DataObject) -> None:
    path = copy / "model.safetensors"
    whole = (sound / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    path.write_bytes(data.draw(damaged(whole[: 8 + length])) + whole[8 + length :])
    survives(checked, copy)


@slow
@given(data=st.data())
def test_headers_of_any_shape(copy: Path, sound: Path, data: st.DataObject) -> None:
    whole = (sound / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.dumps(data.draw(altered(json.loads(whole[8 : 8 + length])))).encode()
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])
    survives(opened, copy)


@slow
@given(data=st.data(), name=st.sampled_from(("config.json", "tokenizer.json", "tokenizer_config.json")))
def test_tables_of_any_shape(copy: Path, sound: Path, data: st.DataObject, name: str) -> None:
    table = json.loads((sound / name).read_text())
    (copy / name).write_text(json.dumps(data.draw(altered(table))))
    survives(opened, copy)
    shutil.copyfile(sound / name, copy / name)


@pytest.mark.parametrize("value", [10**9, 2**63, -1, 1.5, "many", None, [1], {"a": 1}])
@pytest.mark.parametrize(
    "key", ["n_layer", "n_embd", "n_head", "n_positions", "vocab_size", "num_labels", "model_type"]
)
def test_numbers_beyond_any_memory(copy: Path, sound: Path, key: str, value: object) -> None:
    table = json.loads((sound / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**table, key: value}))
    survives(opened, copy)


@quick
@given(name=st.one_of(texts, json_values))
def test_an_index_names_shards_of_its_folder_alone(copy: Path, name: object) -> None:
    (copy / "model.safetensors").unlink(missing_ok=True)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    for path in survives(weightfiles.weights_files, copy, "x", allow_pickle=False) or ():
        assert path.parent == copy
        assert path.suffix == ".safetensors"


class Pwned:
    """Unpickled, it writes a file."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "../pytorch_model.bin"])
def test_nothing_is_unpickled_without_its_option(copy: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(copy)
    (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(pickle.dumps(Pwned()))
    assert survives(opened, copy) is None
    index = {"weight_map": {"transformer.wte.weight": name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert survives(opened, copy) is None
    assert not (copy / "pwned").exists()


@pytest.mark.parametrize("field", ["config.json", "tokenizer_config.json"])
def test_no_code_of_a_folder_runs_without_its_option(copy: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    monkeypatch.chdir(copy)
    (copy / "own.py").write_text("import os\nos.mkdir('pwned')\nclass A: pass\n")
    table = json.loads((copy / field).read_text())
    code = {"AutoConfig": "own.A", "AutoModelForCausalLM": "own.A", "AutoTokenizer": ["own.A", "own.A"]}
    for more in ({}, {"model_type": "own"}):
        (copy / field).write_text(json.dumps({**table, "auto_map": code, **more}))
        survives(opened, copy)
        assert not (copy / "pwned").exists()


# GGUF


@pytest.fixture(scope="module")
def gguf(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from harness.inputs.models.gguf_format import write

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write.write(Checkpoint("x", sound, ""), "F32", path)
    return path


def converted(path: Path, folder: Path) -> None:
    from harness.core.errors import reading

    folder.mkdir(exist_ok=True)
    with reading("the file"), checkpoints.quiet():
        architectures.convert(path, folder)


@quick
@given(data=st.data())
def test_damaged_gguf(gguf: Path, tmp_path: Path, data: st.DataObject) -> None:
    path, whole = tmp_path / "x.gguf", gguf.read_bytes()
    head = len(whole) - 4 * 128 * 64 * 20
    path.write_bytes(data.draw(damaged(whole[:4096])) + whole[4096 : max(head, 65536)])
    survives(GgufFile, path)


@slow
@given(data=st.data())
def test_damaged_gguf_is_converted_or_refused(gguf: Path, tmp_path: Path, data: st.DataObject) -> None:
    path, whole = tmp_path / "x.gguf", gguf.read_bytes()
    path.write_bytes(data.draw(damaged(whole[:8192])) + whole[8192:])
    survives(converted, path, tmp_path / "out")


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


HEAD = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k")
TENSOR = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + string("t")
TRAPS = {
    "empty": b"",
    "arrays in arrays": HEAD + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000,
    "a long array": HEAD + struct.pack("<IIQ", 9, 4, 2**62),
    "a long array of texts": HEAD + struct.pack("<IIQ", 9, 8, 2**62),
    "a long text": HEAD + struct.pack("<IQ", 8, 2**63),
    "many pairs": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63),
    "many tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0),
    "no dimension": TENSOR + struct.pack("<IIQ", 0, 0, 0),
    "many dimensions": TENSOR + struct.pack("<I", 2**32 - 1),
    "huge": TENSOR + struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0),
    "far": TENSOR + struct.pack("<IQIQ", 1, 32, 0, 2**63),
    "unknown type": TENSOR + struct.pack("<IQIQ", 1, 32, 999, 0),
    "alignment 0": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("general.alignment") + struct.pack("<II", 4, 0),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_gguf_traps(tmp_path: Path, trap: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(TRAPS[trap])
    assert survives(GgufFile, path) is None


@pytest.mark.parametrize("text", HOSTILE)
def test_no_tensor_of_a_gguf_file_names_a_path(gguf: Path, tmp_path: Path, text: str) -> None:
    before = sorted(path.name for path in tmp_path.parent.iterdir())
    (tmp_path / "x.gguf").write_bytes(
        gguf.read_bytes().replace(b"blk.0.ffn_up.weight", text.encode()[:19].ljust(19, b"_"))
    )
    survives(converted, tmp_path / "x.gguf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.parent.iterdir()) == before


def test_the_sound_ones_are_read(copy: Path, gguf: Path, tmp_path: Path) -> None:
    opened(copy)
    converted(gguf, tmp_path / "out")
    with pytest.raises(HarnessError):
        checked(tmp_path / "nowhere")


values = st.one_of(
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.floats(width=32),
    texts,
    st.lists(st.integers(0, 2**32), max_size=3),
    st.lists(st.booleans(), max_size=3),
)
keys = st.one_of(st.sampled_from(NAMED), texts.map(lambda text: f"rope.scaling.{text}"), texts)


@quick
@given(
    architecture=st.sampled_from(sorted(hyperparameters.KNOWN)),
    key=keys,
    value=values,
    factors=st.lists(st.floats(width=32), max_size=4),
)
def test_no_key_of_a_gguf_file_is_ignored(architecture: str, key: str, value: object, factors: list[float]) -> None:
    """Of any name and value: it changes the model, it says what is so anyway, or the file is refused."""

    def read(more: dict[str, object], **tensors: Shaped) -> dict[str, object] | None:
        named = {f"{name}.weight": tensor for name, tensor in tensors.items()}
        return survives(hyperparameters.attributes, "x", stated(architecture, more), {**TENSORS, **named})

    before, found = read({}), read({key: value})
    known = {*NAMED, "rope.scale_linear"}
    assert found is None or found != before or key in known
    read({key: value}, rope_freqs=Shaped(len(factors), values=factors))
    read({key: value}, rope_factors_long=Shaped(4, values=factors), rope_factors_short=Shaped(4, values=factors))


@slow
@given(key=st.one_of(st.sampled_from(NAMED), texts), value=values)
def test_gguf_with_a_key_of_any_kind_is_converted_or_refused(
    gguf: Path, tmp_path: Path, key: str, value: object
) -> None:
    survives(converted, rewritten(gguf, tmp_path / "x.gguf", {key: value}), tmp_path / "out")


# adapters


@pytest.fixture
def adapted(copy: Path) -> Path:
    """A model with a sound adapter beside it."""
    generator = torch.Generator().manual_seed(0)
    low, high = torch.randn(2, 64, generator=generator), torch.randn(192, 2, generator=generator)
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_"
    save_file({f"{name}A.weight": low, f"{name}B.weight": high}, copy / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "fan_in_fan_out": True, "alpha_pattern": {}}
    (copy / "adapter_config.json").write_text(json.dumps(settings))
    return copy


def merged(folder: Path, destination: Path) -> dict[str, torch.Tensor]:
    """What a run does with an adapter, up to the weights."""
    from harness.core.errors import reading

    found = adapters.beside(folder, "model 'x'", allow_pickle=False)
    assert found is not None
    destination.mkdir(exist_ok=True)
    with reading("the adapter"):
        adapters.merge(folder, found, destination, "model 'x'")
    return dict(load_file(destination / "model.safetensors"))


@slow
@given(data=st.data())
def test_adapters_of_any_settings(adapted: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Merged by the settings, or refused: never passed over."""
    sound = json.loads((adapted / "adapter_config.json").read_text())
    (adapted / "adapter_config.json").write_text(json.dumps(data.draw(altered(sound))))
    before = load_file(adapted / "model.safetensors")
    found = survives(merged, adapted, tmp_path / "out")
    name = "transformer.h.0.attn.c_attn.weight"
    still = json.loads((adapted / "adapter_config.json").read_text())
    alpha = still.get("lora_alpha", 8) if isinstance(still, dict) else 0
    assert found is None or not torch.equal(found[name], before[name]) or not alpha
    (adapted / "adapter_config.json").write_text(json.dumps(sound))


@slow
@given(data=st.data())
def test_damaged_adapters(adapted: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = adapted / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(data.draw(damaged(whole)))
    survives(merged, adapted, tmp_path / "out")
    path.write_bytes(whole)


@slow
@given(name=texts, shape=st.lists(st.integers(0, 4), max_size=3))
def test_adapters_with_tensors_of_any_name(adapted: Path, tmp_path: Path, name: str, shape: list[int]) -> None:
    path = adapted / "adapter_model.safetensors"
    whole = path.read_bytes()
    for written in (name, f"base_model.model.{name}", f"base_model.model.transformer.h.0.{name}.lora_A.weight"):
        save_file({written: torch.ones(shape)}, path)
        survives(merged, adapted, tmp_path / "out")
    path.write_bytes(whole)
