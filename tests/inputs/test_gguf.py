"""GGUF files of the known architectures, written, read back and run.

Every tokenizer here is made up: no real one of GPT-2, OLMo or Phi-3 is at hand, of Llama's only the embedded model's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from harness.__main__ import main
from harness.core import catalog
from harness.core.contracts import Arguments
from harness.core.errors import BadFile, HarnessError
from harness.core.options import Declared, build
from harness.core.specification import parse, parse_list
from harness.inputs.models import checkpoints, sizes
from harness.inputs.models.gguf_format import architectures, file, tokenizers, write
from harness.inputs.texts import protocols
from harness.metrics.measuring import census
from harness.run.plan import plan
from tests.gguf_models import MADE_UP, TEXT, byte_level, save, sentencepiece, word_level

KINDS = tuple(file.FORMATS)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 60)[None]).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_read_as_the_gguf_package_reads_them(kind: str) -> None:
    weights = np.random.default_rng(0).standard_normal((6, 96)).astype(np.float32)
    weights[0], weights[1, :32] = 0.0, 3.0  # empty and constant blocks
    form = gguf.GGMLQuantizationType[kind]
    raw = gguf.quantize(weights, form).reshape(6, -1).view(np.uint8)
    found = file.dequantize(torch.from_numpy(raw.copy()), kind)
    np.testing.assert_array_equal(found.numpy(), gguf.dequantize(gguf.quantize(weights, form), form).reshape(6, 96))
    assert raw.shape[1] == file.row_bytes(kind, 96)
    meta = file.dequantize(torch.empty(raw.shape, dtype=torch.uint8, device="meta"), kind)
    assert (meta.shape, meta.dtype) == (found.shape, found.dtype)


@pytest.mark.parametrize("name", MADE_UP)
def test_an_f32_file_holds_the_model_exactly(name: str, tmp_path: Path, cache: Path) -> None:
    before = save(name, tmp_path / "model")
    size = write.write(before, "F32", tmp_path / "x.gguf")
    assert size == (tmp_path / "x.gguf").stat().st_size
    assert architectures.architecture_of(file.GgufFile(tmp_path / "x.gguf")) is not None  # not through transformers
    after = checkpoints.materialise(parse(f"path:{tmp_path}/x.gguf"), Declared(tmp_path))
    old, new = (checkpoints.open_model(item, "fp32", "cpu") for item in (before, after))
    assert old.state_dict().keys() == new.state_dict().keys()
    assert all(torch.equal(weight, new.state_dict()[key]) for key, weight in old.state_dict().items())
    assert torch.equal(logits(old), logits(new))
    theirs, ours = checkpoints.tokenizer(before), checkpoints.tokenizer(after)
    assert theirs(TEXT).input_ids == ours(TEXT).input_ids
    assert ours.decode(ours(TEXT).input_ids, skip_special_tokens=True) == TEXT
    assert [theirs.bos_token_id, theirs.eos_token_id] == [ours.bos_token_id, ours.eos_token_id]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MADE_UP)
def test_the_method_runs_from_the_file_s_blocks(name: str, kind: str, tmp_path: Path, cache: Path) -> None:
    """Its logits are those of the folder that the same file becomes, and its bytes are predicted."""
    source = save(name, tmp_path / "model")
    method = catalog.methods()[f"gguf-{kind.lower()}"]
    model: Any = method.load(source, Arguments("fp32"), "cpu")
    write.write(source, kind, tmp_path / "x.gguf")
    after = checkpoints.materialise(parse(f"path:{tmp_path}/x.gguf"), Declared(tmp_path))
    assert torch.equal(logits(model), logits(checkpoints.open_model(after, "fp32", "cpu")))
    config = checkpoints.read_config(source)
    predicted = sizes.predict(config, method, Arguments("fp32"))
    measured = sizes.measure(model)
    assert {key: predicted[key] for key in measured} == measured
    original = dict(checkpoints.sketch_model(config, "fp32").named_modules())
    found = census.census(model, method, Arguments("fp32"), original)
    assert found["quantized_modules"] == len(method.targets(original[""], Arguments("fp32")))
    assert method.file_bytes is not None
    assert method.file_bytes(model) == (tmp_path / "x.gguf").stat().st_size
    assert not list((cache / "scratch").iterdir())


def test_the_error_falls_as_bits_grow(tmp_path: Path, cache: Path) -> None:
    source = save("llama", tmp_path / "model")
    exact = logits(checkpoints.open_model(source, "fp32", "cpu"))
    errors = []
    for kind in ("Q4_0", "Q5_0", "Q8_0", "F16", "F32"):
        found = logits(catalog.methods()[f"gguf-{kind.lower()}"].load(source, Arguments("fp32"), "cpu"))
        errors.append(float((found - exact).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_embedding_and_head_have_eight_bits_at_least(tmp_path: Path, cache: Path) -> None:
    write.write(save("olmo", tmp_path / "model"), "Q4_0", tmp_path / "x.gguf")
    kinds = {name: tensor.kind for name, tensor in file.GgufFile(tmp_path / "x.gguf").tensors.items()}
    assert {name for name, kind in kinds.items() if kind == "Q8_0"} == {"token_embd.weight", "output.weight"}
    assert {kind for name, kind in kinds.items() if name.startswith("blk.")} == {"Q4_0"}


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_llama_cpp_s_entries_are_there(make: Any) -> None:
    tokenizer = make()
    facts = tokenizers.metadata(tokenizer, 320)
    assert len(facts["tokenizer.ggml.tokens"]) == len(facts["tokenizer.ggml.token_type"]) == 320
    assert facts["tokenizer.ggml.token_type"][-1] == tokenizers.UNUSED
    assert facts["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    if make is sentencepiece:
        assert facts["tokenizer.ggml.token_type"].count(tokenizers.BYTE) == 256
        assert facts["tokenizer.ggml.add_space_prefix"] is True
        assert facts["tokenizer.ggml.add_bos_token"] is True


def cutting(name: str) -> Any:
    """A byte-level tokenizer that cuts text as a pre-tokenizer of llama.cpp does, with merges across its borders."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    made, cut = byte_level(), tokenizers.SPLITTERS[name]
    core = made.backend_tokenizer
    core.model.ignore_merges = cut.whole
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    steps += [pre_tokenizers.Split(Regex(cut.pattern), "isolated")] if cut.pattern else []
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut.pattern)]
    )
    if cut.normalizer:
        core.normalizer = normalizers.NFC()
    return made


@pytest.mark.parametrize("name", tokenizers.SPLITTERS)
def test_a_byte_level_tokenizer_goes_there_and_back(name: str, tmp_path: Path) -> None:
    text = "In 2001 it wasn't 12345; THE the e\u0301 HelloWorld\n\n\tx = 3.14\r\n  \u0439\u0438 don't"
    made = cutting(name)
    facts = tokenizers.metadata(made, 320)
    assert tokenizers.SPLITTERS[facts["tokenizer.ggml.pre"]] == tokenizers.SPLITTERS[name]
    tokenizers.write({**facts, "tokenizer.ggml.pre": name}, tmp_path)
    again: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == made(text).input_ids
    assert again.decode(again(text).input_ids) == made.decode(made(text).input_ids)


@pytest.mark.parametrize(
    ("facts", "first"),
    [
        ({"tokenizer.ggml.pre": "llama-bpe"}, 0),  # llama.cpp adds BOS where nothing is said, for these
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, None),
        ({"tokenizer.ggml.pre": "qwen2"}, None),
        ({"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": True}, 0),
    ],
)
def test_bos_is_added_where_llama_cpp_adds_it(facts: dict[str, Any], first: int | None, tmp_path: Path) -> None:
    found = tokenizers.metadata(byte_level(), 320)
    del found["tokenizer.ggml.add_bos_token"]
    tokenizers.write({**found, **facts}, tmp_path)
    again: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert protocols.leading_token(again, "the cat") == first
    pieces = tokenizers.metadata(sentencepiece(), 320)
    del pieces["tokenizer.ggml.add_bos_token"]
    tokenizers.write(pieces, tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert protocols.leading_token(again, "the cat") == again.bos_token_id


def test_a_tokenizer_that_cuts_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    facts = tokenizers.metadata(byte_level(), 320)
    for pre, match in (("house", "cuts text as 'house'; known are gpt-2, "), (None, "does not say how it cuts text")):
        with pytest.raises(BadFile, match=match):
            tokenizers.convert(tmp_path / "x.gguf", {**facts, "tokenizer.ggml.pre": pre}, tmp_path)
    del facts["tokenizer.ggml.pre"]
    with pytest.raises(BadFile, match="does not say"):
        tokenizers.convert(tmp_path / "x.gguf", facts, tmp_path)
    tokenizers.convert(tmp_path / "x.gguf", {**facts, "general.architecture": "gpt2"}, tmp_path)  # older than the key
    assert (tmp_path / "tokenizer.json").is_file()


def test_a_word_level_tokenizer_goes_as_its_json(tmp_path: Path) -> None:
    tokenizer = word_level()
    facts = tokenizers.metadata(tokenizer, 64)
    assert facts["tokenizer.ggml.model"] == "none"
    tokenizers.write(facts, tmp_path)
    again: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("b a c").input_ids == tokenizer("b a c").input_ids == [1, 0, 2]


def test_tokenizers_that_llama_cpp_would_split_otherwise_are_refused() -> None:
    from tokenizers import pre_tokenizers

    odd = byte_level()
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(HarnessError, match="it splits text by"):
        tokenizers.metadata(odd, 320)
    with pytest.raises(HarnessError, match="has no row among the 10"):
        tokenizers.metadata(byte_level(), 10)
    with pytest.raises(HarnessError, match="not those of a SentencePiece vocabulary"):
        tokenizers.metadata(sentencepiece(drop_last_merge=True), 320)


def test_what_llama_cpp_does_not_compute_is_refused(tmp_path: Path, cache: Path) -> None:
    cases = {
        "its hidden_act is 'gelu'": transformers.LlamaConfig(hidden_act="gelu"),
        "are scaled or partial": transformers.LlamaConfig(
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        ),
        "no GGUF is written for 'opt'": transformers.OPTConfig(),
    }
    for match, config in cases.items():
        with pytest.raises(HarnessError, match=match):
            architectures.of_config(config)


def test_rows_that_no_block_divides_name_the_tensor(tmp_path: Path, cache: Path) -> None:
    source = save("llama", tmp_path / "model", hidden_size=48, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(HarnessError, match=r"cannot store token_embd.*a row of 48 weights is no multiple of Q8_0"):
        write.write(source, "Q4_0", tmp_path / "x.gguf")


def test_non_finite_weights_name_the_tensor(tmp_path: Path, cache: Path) -> None:
    source = save("gpt2", tmp_path / "model", spoil=True)
    with pytest.raises(HarnessError, match=r"cannot store token_embd\.weight: 1 non-finite"):
        write.write(source, "Q4_0", tmp_path / "x.gguf")


def test_rotary_rows_go_there_and_back() -> None:
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    assert architectures.halves_together(rows, 2)[:, 0].tolist() == [0, 6, 3, 9, 12, 18, 15, 21]
    np.testing.assert_array_equal(architectures.halves_apart(architectures.halves_together(rows, 2), 2), rows)
    bias = np.arange(8, dtype=np.float32)
    np.testing.assert_array_equal(architectures.halves_apart(architectures.halves_together(bias, 2), 2), bias)


def test_the_convert_command(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("llama", tmp_path / "model")
    source, target = f"path:{tmp_path}/model", tmp_path / "out.gguf"
    assert main(["convert", source, "--to", "gguf-q8_0", "-o", str(target)]) == 0
    assert f"{target.stat().st_size:,} bytes" in capsys.readouterr().out
    assert file.GgufFile(target).tensors["blk.0.attn_q.weight"].kind == "Q8_0"
    for words, match in (
        (["--to", "gguf-q9", "-o", str(target)], "gguf-q8_0"),
        (["--to", "gguf-q8_0", "-o", str(tmp_path / "out.bin")], "does not end in .gguf"),
        (["--to", "gguf-q8_0", "-o", str(tmp_path / "none" / "out.gguf")], "there is no folder"),
    ):
        assert main(["convert", source, *words]) == 2
        assert match in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".gguf") == ["out.gguf"]


def test_planned_when_named_and_its_file_measured(tmp_path: Path) -> None:
    declared = Declared(tmp_path)
    options = build({"metrics": ("memory",)}, declared, tmp_path)
    assert not [case for case in plan(options, False) if "gguf" in case.method or case.metric == "memory.file"]
    options = build({"metrics": ("memory",), "methods": parse_list("gguf-q4_0,nf4")}, declared, tmp_path)
    files = [case.method for case in plan(options, False) if case.metric == "memory.file"]
    assert files == ["gguf-q4_0"]
    options = build({"metrics": ("memory",), "methods": parse_list("all-installed")}, declared, tmp_path)
    assert {f"gguf-{kind.lower()}" for kind in KINDS} <= {case.method for case in plan(options, False)}


def test_the_embedded_model_s_file_is_written_again_as_it_was(tmp_path: Path) -> None:
    """Q4_1 of weights that were stored as Q4_1: every tensor's bytes come back."""
    from harness.inputs.models import names

    source = checkpoints.materialise(parse("smollm2-135m"), Declared(tmp_path))
    write.write(source, "Q4_1", tmp_path / "x.gguf")
    old = file.GgufFile(names.locate(parse("smollm2-135m"), Declared(tmp_path)).path)
    new = file.GgufFile(tmp_path / "x.gguf")
    assert old.tensors.keys() == new.tensors.keys()
    for name, tensor in old.tensors.items():
        assert tensor.kind == new.tensors[name].kind, name
        np.testing.assert_array_equal(tensor.data, new.tensors[name].data)
    for key, value in new.metadata.items():
        if key not in ("general.name", "tokenizer.ggml.add_eos_token"):
            assert value == old.metadata[key], key
    assert source.grid == catalog.methods()["gguf-q4_1"].grid
