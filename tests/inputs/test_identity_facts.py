"""What a model is: an edit that moves figures is named, another way to write the same is not seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from harness.core.contracts import Checkpoint
from harness.core.errors import BadFile
from harness.core.identity import DEFAULT, changed_facts, identity_digest, identity_of
from harness.inputs.models import folder as weightfiles
from harness.inputs.models import identity_facts

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "transformers_version": "4.40.0",
    "temperature": 0.6,
}
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "<s>", "special": True}],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "c": 4, "abc": 5}, "merges": ["a b", "ab c"]},
}
SETTINGS: dict[str, Any] = {"add_bos_token": False, "bos_token": "<s>", "chat_template": "{{ messages }}"}
TENSORS: dict[str, Any] = {"model.a": np.arange(8, dtype=np.float32), "model.b": np.ones((2, 3), np.float16)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "model"
    made.mkdir()
    write(made / "config.json", CONFIG)
    write(made / "tokenizer.json", TOKENIZER)
    write(made / "tokenizer_config.json", SETTINGS)
    save_file(TENSORS, made / "model.safetensors")
    return made


def write(path: Path, data: Any, **how: Any) -> None:
    path.write_text(json.dumps(data, **how))


def edit(path: Path, **values: Any) -> None:
    write(path, {**json.loads(path.read_text()), **values})


def facts(folder: Path, **allowed: Any) -> dict[str, str]:
    return identity_facts.identified(folder, "model 'm'", **allowed)[1]


def test_an_identity_is_flat_canonical_and_names_its_defaults(folder: Path) -> None:
    found = facts(folder)
    assert found["config.rms_norm_eps"] == "1e-05"
    assert found["config.rope_theta"] == f"10000{DEFAULT}"
    assert found["config.architectures"] == '["LlamaForCausalLM"]'
    assert found["tokenizer.add_bos_token"] == "false"
    assert not [name for name in found if "temperature" in name or "dtype" in name or "version" in name]
    assert not [name for name in found if name.startswith(("code.", "adapter."))]
    checkpoint = Checkpoint("m", folder, "r")
    assert identity_of(checkpoint) != identity_of(Checkpoint("m", folder, "s"))  # nobody looked: at least the weights
    assert identity_of(Checkpoint("m", folder, "r", identity=found)) == identity_digest(found)


def lost_merges(folder: Path) -> None:
    edit(folder / "tokenizer.json", model={**TOKENIZER["model"], "merges": ["a b"]})


def other_weights(folder: Path) -> None:
    save_file({**TENSORS, "model.a": TENSORS["model.a"][::-1].copy()}, folder / "model.safetensors")


EDITS: dict[str, Callable[[Path], object]] = {
    "config.rope_theta: 10000 -> 11000": lambda at: edit(at / "config.json", rope_theta=11000),
    "config.rms_norm_eps: 1e-05 -> 0.0001": lambda at: edit(at / "config.json", rms_norm_eps=1e-4),
    "config.rope_scaling.factor: absent -> 2": lambda at: edit(
        at / "config.json", rope_scaling={"type": "linear", "factor": 2.0}
    ),
    "config.unheard_of: absent -> 3": lambda at: edit(at / "config.json", unheard_of=3),
    "config.num_key_value_heads: absent -> 1": lambda at: edit(at / "config.json", num_key_value_heads=1),
    "tokenizer.add_bos_token: false -> true": lambda at: edit(at / "tokenizer_config.json", add_bos_token=True),
    "tokenizer.normalizer: absent -> ": lambda at: edit(at / "tokenizer.json", normalizer={"type": "Lowercase"}),
    "tokenizer.model: ": lost_merges,
    "weights: ": other_weights,
}


@pytest.mark.parametrize("line", EDITS)
def test_what_moves_figures_is_named(folder: Path, line: str) -> None:
    before = facts(folder)
    EDITS[line](folder)
    now = facts(folder)
    assert identity_digest(now) != identity_digest(before)
    lines = changed_facts(before, now)
    assert any(one.startswith(line) for one in lines), lines
    assert len(lines) == (2 if "rope_scaling" in line else 1)  # the kind of scaling and its factor


def resharded(folder: Path) -> None:
    names = {name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate(sorted(TENSORS), 1)}
    for name, file in names.items():
        save_file({name: TENSORS[name]}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    write(folder / "model.safetensors.index.json", {"weight_map": names})


def saved_again(folder: Path) -> None:
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    assert {"rope_parameters", "head_dim", "attention_bias"} <= json.loads((folder / "config.json").read_text()).keys()


def reformatted(folder: Path) -> None:
    pairs = [merge.split(" ") for merge in TOKENIZER["model"]["merges"]]
    model = {**TOKENIZER["model"], "merges": pairs, "ignore_merges": False, "dropout": None}
    write(folder / "tokenizer.json", {**TOKENIZER, "model": model}, indent=4, sort_keys=True)


SAME: dict[str, Callable[[Path], object]] = {
    "resharded": resharded,
    "saved again by transformers": saved_again,
    "other order, other numbers": lambda at: write(
        at / "config.json", {**dict(reversed(CONFIG.items())), "rope_theta": 10000, "rms_norm_eps": 0.00001}, indent=3
    ),
    "another release": lambda at: edit(at / "config.json", transformers_version="5.23.0", _name_or_path="elsewhere"),
    "dtype": lambda at: edit(at / "config.json", torch_dtype=None, dtype="float32"),
    "sampling and labels": lambda at: edit(at / "config.json", temperature=1, top_p=0.9, id2label={"0": "x"}),
    "dropout": lambda at: edit(at / "config.json", attention_dropout=0.1, initializer_range=0.5),
    "a default stated": lambda at: edit(at / "config.json", mlp_bias=False, head_dim=8, num_key_value_heads=2),
    "tokenizer.json": reformatted,
    "chat template": lambda at: edit(at / "tokenizer_config.json", chat_template="other", model_max_length=1e30),
    "a token with its habits": lambda at: edit(at / "tokenizer_config.json", bos_token={"content": "<s>"}),
    "generation": lambda at: write(at / "generation_config.json", {"do_sample": True, "eos_token_id": 3}),
    "code that nobody runs": lambda at: (at / "modeling.py").write_text("x = 1"),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_written_otherwise_is_the_same(folder: Path, name: str) -> None:
    before = facts(folder)
    SAME[name](folder)
    now = facts(folder)
    assert changed_facts(before, now) == []
    assert identity_digest(now) == identity_digest(before)


def test_scaled_positions_have_one_name_however_they_are_written(folder: Path) -> None:
    edit(folder / "config.json", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    before = facts(folder)
    assert (before["config.rope_theta"], before["config.rope_scaling.factor"]) == ("500000", "2")
    saved_again(folder)
    assert changed_facts(before, facts(folder)) == []


def test_the_models_own_code_counts_where_it_runs(folder: Path) -> None:
    edit(folder / "config.json", model_type="warped", auto_map={"AutoConfig": "warped.WarpedConfig"})
    (folder / "warped.py").write_text("SCALE = 0.5\n")
    other = Path(shutil.copytree(folder, folder.with_name("other")))
    (other / "warped.py").write_text("SCALE = 0.25\n")
    before, now = (facts(one, trust_remote_code=True) for one in (folder, other))
    assert [line.partition(":")[0] for line in changed_facts(before, now)] == ["code.warped.py"]
    assert identity_digest(before) != identity_digest(now)
    assert "config.auto_map.AutoConfig" in before
    assert changed_facts(facts(folder), facts(other)) == []  # not trusted, not run


def test_what_the_first_gptq_files_say_beside_their_config_counts(folder: Path) -> None:
    before = facts(folder)
    write(folder / "quantize_config.json", {"bits": 4})
    assert facts(folder) == before  # nothing of it is packed
    save_file({**TENSORS, "model.c.qweight": np.ones((2, 2), np.int32)}, folder / "model.safetensors")
    packed = facts(folder)
    assert packed["config.quantization_config.bits"] == "4"
    write(folder / "quantize_config.json", {"bits": 4, "checkpoint_format": "gptq_v2"})
    assert changed_facts(packed, facts(folder)) == ["config.quantization_config.checkpoint_format: absent -> gptq_v2"]
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert identity_digest(facts(folder)) == identity_digest(packed)


def test_an_adapter_counts(folder: Path) -> None:
    plain = facts(folder)
    write(folder / "adapter_config.json", {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "/somewhere"})
    save_file({"lora_A": np.ones(4, np.float32)}, folder / "adapter_model.safetensors")
    before = facts(folder)
    assert before.keys() - plain.keys() == {"adapter.peft_type", "adapter.r", "adapter.weights"}
    save_file({"lora_A": np.zeros(4, np.float32)}, folder / "adapter_model.safetensors")
    assert [line.partition(":")[0] for line in changed_facts(before, facts(folder))] == ["adapter.weights"]


def test_a_vocabulary_of_other_files(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    write(folder / "vocab.json", {"a": 0, "b": 1})
    (folder / "merges.txt").write_text("a b\n")
    before = facts(folder)
    assert {"tokenizer.vocab.json", "tokenizer.merges.txt"} <= before.keys()
    write(folder / "vocab.json", {"b": 1, "a": 0}, indent=1)
    assert facts(folder) == before
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"7": {"content": "<new>"}})
    assert [line.partition(":")[0] for line in changed_facts(before, facts(folder))] == [
        "tokenizer.added_tokens_decoder"
    ]


def test_weights_are_read_once_for_a_state_of_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = identity_facts.hashed
    read: list[Any] = []

    def counted(*given: Any) -> tuple[str, str]:
        read.append(given)
        return hashed(*given)

    monkeypatch.setattr(identity_facts, "hashed", counted)
    revision, first = identity_facts.identified(folder, "m")
    assert revision == weightfiles.revision(folder, "m")
    assert identity_facts.identified(folder, "m") == (revision, first)
    assert len(read) == 2  # written just now: the same time may come to stand on other bytes
    monkeypatch.setattr(identity_facts, "SETTLED", -(10**18))
    assert [identity_facts.identified(folder, "m") for _ in range(3)] == [(revision, first)] * 3
    assert len(read) == 3
    assert identity_facts.identified(folder, "m", verify=True) == (revision, first)
    assert len(read) == 4
    save_file(load_file(folder / "model.safetensors"), folder / "new")
    (folder / "new").replace(folder / "model.safetensors")  # the same bytes: looked at all the same
    assert identity_facts.identified(folder, "m") == (revision, first)
    assert len(read) == 5
    (kept,) = (folder.parent / "cache" / "identities").iterdir()
    kept.write_text("{}")  # damaged: found again
    assert identity_facts.identified(folder, "m") == (revision, first)


@pytest.mark.parametrize("places", [[[0, 4], [0, 4]], [[0, 4], [8, 12]], [[0, 4], ["x", 8]]])
def test_tensors_that_overlap_or_lie_apart_are_refused(folder: Path, places: list[list[Any]]) -> None:
    entries = {f"t{number}": {"dtype": "F32", "shape": [1], "data_offsets": at} for number, at in enumerate(places)}
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(BadFile, match="without tensors' places"):
        facts(folder)
