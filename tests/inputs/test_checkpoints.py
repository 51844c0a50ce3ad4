from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OlmoConfig, Phi3Config, core_model_loading
from transformers.utils import logging

from harness.core.contracts import DTYPES, Checkpoint
from harness.core.errors import BadFile, HarnessError, MissingAsset
from harness.core.files import sha256_file
from harness.core.options import Declared
from harness.core.specification import parse
from harness.inputs.models import checkpoints
from harness.inputs.models import folder as weightfiles
from harness.inputs.models.gguf_format import architectures
from harness.inputs.models.gguf_format import file as gguf_file
from harness.run.group import failure

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4),
    "olmo": lambda: OlmoConfig(**SMALL, pad_token_id=None),
    "phi3": lambda: Phi3Config(**SMALL, pad_token_id=None, bos_token_id=1, eos_token_id=2),
}


def save(directory: Path, name: str) -> Checkpoint:
    """A random model as a plain folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]()).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return Checkpoint(f"path:{directory}", directory, revision="")


def change(checkpoint: Checkpoint, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Edit the saved weights."""
    path = checkpoint.directory / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path, metadata={"format": "pt"})


def described(model: Any) -> list[tuple[str, tuple[int, ...], torch.dtype, bool]]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for name, tensor in tensors]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sketch_is_the_opened_model_without_weights(tmp_path: Path, name: str) -> None:
    checkpoint = save(tmp_path, name)
    for dtype in DTYPES:
        opened: Any = checkpoints.open_model(checkpoint, dtype, "cpu")
        sketch: Any = checkpoints.sketch_model(checkpoints.read_config(checkpoint), dtype)
        assert described(sketch) == described(opened)
        assert sketch.get_memory_footprint() == opened.get_memory_footprint()
        assert all(tensor.is_meta for tensor in (*sketch.parameters(), *sketch.buffers()))
        assert not sketch.training
        assert not opened.training
        for model in (sketch, opened):
            tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
            assert tied == (name in {"llama", "gpt2"})
        assert next(opened.parameters()).dtype == checkpoints.TORCH_DTYPES[dtype]
        assert opened.config._attn_implementation == sketch.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", CONFIGS)
def test_an_opened_model_has_the_saved_weights(tmp_path: Path, name: str) -> None:
    checkpoint = save(tmp_path, name)
    saved = load_file(tmp_path / "model.safetensors")
    loaded = checkpoints.open_model(checkpoint, "bf16", "cpu").state_dict()
    assert set(saved) <= set(loaded)
    assert all(torch.equal(loaded[key], weight.bfloat16()) for key, weight in saved.items())


def test_weights_that_do_not_match_are_named(tmp_path: Path) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    edits: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        rf"lack {key}: config and weights do not match": lambda state: state.pop(key),
        r"hold what the architecture does not: stray.weight:": lambda state: state.update(
            {"stray.weight": torch.ones(2)}
        ),
        rf"have other shapes for {key}:": lambda state: state.update({key: torch.ones(3, 64)}),
    }
    for index, (message, edit) in enumerate(edits.items()):
        checkpoint = save(tmp_path / str(index), "llama")
        change(checkpoint, edit)
        with pytest.raises(BadFile, match=message) as caught:
            checkpoints.open_model(checkpoint, "fp32", "cpu")
        assert "\n" not in str(caught.value)


def test_an_old_gpt2_checkpoint_opens(tmp_path: Path) -> None:
    """The Hub's GPT-2 has names without their prefix, and causal masks as weights."""
    checkpoint = save(tmp_path, "gpt2")
    weights = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    state = checkpoints.open_model(checkpoint, "fp32", "cpu").state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())


def test_pickled_weights_open_only_where_the_checkpoint_allows(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, "olmo")
    safe = tmp_path / "model.safetensors"
    weights = load_file(safe)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    safe.unlink()
    with pytest.raises(MissingAsset, match="--allow-pickle"):
        checkpoints.open_model(checkpoint, "fp32", "cpu")
    allowed = Checkpoint("path:x", tmp_path, "", allow_pickle=True)
    state = checkpoints.open_model(allowed, "fp32", "cpu").state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())


def test_loading_says_nothing_and_restores_the_library_s_voice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save(tmp_path, "llama")
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    capfd.readouterr()
    checkpoints.open_model(checkpoint, "fp16", "cpu")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_the_revision_of_a_folder_is_its_weights_hash(tmp_path: Path) -> None:
    directory = save(tmp_path / "model", "llama").directory
    here, specification = Declared(tmp_path), parse(f"path:{directory}")
    checkpoint = checkpoints.materialise(specification, here)
    assert checkpoint.directory == directory
    assert checkpoint.revision == sha256_file(directory / "model.safetensors")
    assert (checkpoint.note, checkpoint.grid, checkpoint.specification) == ("", "", str(specification))
    change(checkpoint, lambda state: state["model.norm.weight"].mul_(2))
    assert checkpoints.materialise(specification, here).revision != checkpoint.revision


def test_the_revision_of_shards_depends_on_each(tmp_path: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {"b": names[1], "a": names[0]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    seen = set()
    for first, second in (("one", "two"), ("two", "one"), ("one", "three")):
        (tmp_path / names[0]).write_text(first)
        (tmp_path / names[1]).write_text(second)
        seen.add(weightfiles.revision(tmp_path, "model"))
    assert len(seen) == 3


# the cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checkpoints"


def fill(folder: Path) -> dict[str, str]:
    save_file({"w": torch.ones(4)}, folder / "model.safetensors")
    return {"note": "filled"}


def test_a_folder_is_built_once(cache: Path) -> None:
    folder, record = weightfiles.built("thing", fill)
    assert folder == cache / "thing"
    assert record["note"] == "filled"
    assert record["revision"] == sha256_file(folder / "model.safetensors")

    def never(_: Path) -> dict[str, str]:
        raise AssertionError

    assert weightfiles.built("thing", never) == (folder, record)


def test_a_build_that_fails_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> dict[str, str]:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weightfiles.built("thing", fail)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_leftovers_and_truncated_folders_are_built_anew(cache: Path) -> None:
    left = cache / ".thing.killed"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    other = cache / ".thing-2.busy"
    other.mkdir()
    folder, record = weightfiles.built("thing", fill)
    assert not left.exists()
    assert other.exists()  # another name's, under another lock
    os.truncate(folder / "model.safetensors", 10)
    again = weightfiles.built("thing", fill)
    assert (again[0], again[1]["revision"]) == (folder, record["revision"])
    assert (folder / "model.safetensors").stat().st_size > 10
    (folder / weightfiles.RECORD).write_text("{")
    assert weightfiles.built("thing", fill)[1]["revision"] == record["revision"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "harness.json"])
def test_a_flipped_bit_is_built_anew(cache: Path, name: str) -> None:
    folder, record = weightfiles.built("thing", fill)
    flip(folder / name)
    assert weightfiles.built("thing", fill)[1]["revision"] == record["revision"]
    assert weightfiles.revision(folder, "it") == record["revision"]


def test_a_flipped_bit_under_an_old_date_is_found_where_files_are_verified(cache: Path) -> None:
    folder, record = weightfiles.built("thing", fill)
    weights = folder / "model.safetensors"
    status = weights.stat()
    flip(weights)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weightfiles.built("thing", fill, verify=True)[1]["revision"] == record["revision"]
    assert weightfiles.revision(folder, "it") == record["revision"]


def test_files_that_were_only_touched_are_kept(cache: Path) -> None:
    folder, record = weightfiles.built("thing", fill)
    os.utime(folder / "model.safetensors", (0, 0))
    assert weightfiles.built("thing", lambda folder: pytest.fail("built again")) == (folder, record)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("I/O error: full (os error 28)")])
def test_a_full_disk_is_one_line_whoever_tells_it(cache: Path, error: Exception) -> None:
    def fail(folder: Path) -> dict[str, str]:
        raise error

    with pytest.raises(HarnessError, match="make room, or set HARNESS_CACHE"):
        weightfiles.built("thing", fail)
    assert not list(cache.glob(".thing.*"))


def test_two_at_once_build_once(cache: Path) -> None:
    builds: list[Path] = []
    inside = threading.Event()

    def slow(folder: Path) -> dict[str, str]:
        builds.append(folder)
        inside.wait(0.3)
        return fill(folder)

    threads = [threading.Thread(target=weightfiles.built, args=("thing", slow)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def test_a_cache_that_cannot_be_written_names_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(HarnessError, match="set HARNESS_CACHE to a folder with more") as caught:
        weightfiles.built("thing", fill)
    assert "\n" not in str(caught.value)


# GGUF


def write_gguf(path: Path, architecture: str, *, kind: str = "Q4_1") -> dict[str, Any]:
    """A small random GGUF file of a Llama (with grouped heads) or a GPT-2; returns the tensors as stored."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(96)
    context = 64
    writer.add_context_length(context)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(256 if architecture == "gpt2" else 128)
    writer.add_block_count(2)
    writer.add_head_count(4)
    generator = np.random.default_rng(0)
    tensors: dict[str, tuple[int, ...]]
    inner: dict[str, tuple[int, ...]]
    if architecture == "llama":
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10_000.0)
        writer.add_rope_dimension_count(16)
        tensors = {"token_embd.weight": (96, 64), "output_norm.weight": (64,)}
        inner = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
        inner |= {"ffn_gate": (128, 64), "ffn_up": (128, 64), "ffn_down": (64, 128)}
        inner |= {"attn_norm": (64,), "ffn_norm": (64,)}
        tensors |= {f"blk.{layer}.{name}.weight": shape for layer in (0, 1) for name, shape in inner.items()}
    else:
        writer.add_layer_norm_eps(1e-5)
        tensors = {"token_embd.weight": (96, 64), "position_embd.weight": (context, 64)}
        inner = {"attn_qkv": (192, 64), "attn_output": (64, 64), "ffn_up": (256, 64), "ffn_down": (64, 256)}
        for layer in (0, 1):
            for name, shape in inner.items():
                tensors |= {f"blk.{layer}.{name}.weight": shape, f"blk.{layer}.{name}.bias": shape[:1]}
            for name in ("attn_norm", "ffn_norm"):
                tensors |= {f"blk.{layer}.{name}.weight": (64,), f"blk.{layer}.{name}.bias": (64,)}
        tensors |= {"output_norm.weight": (64,), "output_norm.bias": (64,), "output.weight": (96, 64)}
    printable = [chr(code) for code in range(33, 124)]  # 91 bytes spelled as they are; a space is spelled U+0120
    words = ["<|end|>", *printable, "\u0120", "ab", "abc", "\u0120a"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3] + [1] * 95)
    writer.add_token_merges(["a b", "ab c", "\u0120 a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    written = {}
    for name, shape in tensors.items():
        values = generator.standard_normal(shape).astype(np.float32)
        quantized = kind != "F32" and len(shape) == 2 and name.startswith("blk.")
        stored = gguf.GGMLQuantizationType[kind if quantized else "F32"]
        raw = gguf.quantize(values, stored)
        writer.add_tensor(name, raw, raw_dtype=stored)
        written[name] = gguf.dequantize(raw, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def test_the_reader_gives_what_the_package_s_reader_gives(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "a.gguf", "llama")
    ours, theirs = gguf_file.GgufFile(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "a.gguf")
    assert set(ours.metadata) == {name for name in theirs.fields if not name.startswith("GGUF.")}
    for name, value in ours.metadata.items():
        assert value == theirs.fields[name].contents()
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for name, values in written.items():
        np.testing.assert_array_equal(ours.tensors[name].dequantize(), values)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F32"])
def test_a_llama_is_converted_as_transformers_would(tmp_path: Path, kind: str, cache: Path) -> None:
    path = tmp_path / "small.gguf"
    write_gguf(path, "llama", kind=kind)
    said: list[str] = []
    checkpoint = checkpoints.materialise(parse(f"path:{path}"), Declared(tmp_path), say=said.append)
    assert said == ["converting small.gguf to fp32 (once, some 10 seconds)", "converted small.gguf"]
    ours: Any = checkpoints.open_model(checkpoint, "fp32", "cpu")
    with checkpoints.quiet():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in ours.state_dict().items())
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)
    assert ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert not hasattr(ours.config, "quantization_config")
    assert checkpoint.grid == ("affine4:32" if kind == "Q4_1" else "")
    assert ("Q4_1, affine 4-bit in blocks of 32," in checkpoint.note) == (kind == "Q4_1")
    assert checkpoint.note == "" if kind == "F32" else kind in checkpoint.note
    again = checkpoints.materialise(parse(f"path:{path}"), Declared(tmp_path), say=said.append)
    assert again == checkpoint
    assert len(said) == 2


def test_the_converted_tokenizer_splits_digits(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "small.gguf"
    write_gguf(path, "llama")
    checkpoint = checkpoints.materialise(parse(f"path:{path}"), Declared(tmp_path))
    tokenizer: Any = checkpoints.tokenizer(checkpoint)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc a12<|end|>").input_ids) == [
        *("abc", "\u0120a", "1", "2", "<|end|>")
    ]
    assert tokenizer.decode(tokenizer("abc a12").input_ids) == "abc a12"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|end|>", "<|end|>")
    assert len(tokenizer) == 96


def test_other_architectures_go_through_transformers(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architectures, "architecture_of", lambda file: None)
    path = tmp_path / "small.gguf"
    written = write_gguf(path, "gpt2", kind="Q8_0")
    checkpoint = checkpoints.materialise(parse(f"path:{path}"), Declared(tmp_path))
    state = checkpoints.open_model(checkpoint, "fp32", "cpu").state_dict()
    values = torch.from_numpy(written["blk.1.ffn_up.weight"])  # (out, in); Conv1D keeps (in, out)
    torch.testing.assert_close(state["transformer.h.1.mlp.c_fc.weight"], values.T)
    assert not hasattr(checkpoints.read_config(checkpoint), "quantization_config")


def test_rows_are_reordered_by_halves() -> None:
    # one head of four: x0 y0 x1 y1 becomes x0 x1 y0 y1; a second head follows
    rows = np.array([[10], [20], [11], [21], [30], [40], [31], [41]], dtype=np.float32)
    assert architectures.halves_apart(rows, 2)[:, 0].tolist() == [10, 11, 20, 21, 30, 31, 40, 41]


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_gguf_is_one_line_and_leaves_nothing(tmp_path: Path, cache: Path, kept: float) -> None:
    path = tmp_path / "small.gguf"
    write_gguf(path, "llama")
    os.truncate(path, int(kept * path.stat().st_size))
    with pytest.raises(BadFile, match="cannot be read as GGUF") as caught:
        checkpoints.materialise(parse(f"path:{path}"), Declared(tmp_path))
    assert "\n" not in str(caught.value)
    assert [folder for folder in cache.iterdir() if folder.is_dir()] == []


def test_a_gguf_of_an_unknown_architecture_is_one_line(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "small.gguf"
    write_gguf(path, "house")
    with pytest.raises(BadFile, match="transformers does not read from GGUF") as caught:
        checkpoints.materialise(parse(f"path:{path}"), Declared(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("collected", [True, False])
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "out of memory on the card: CUDA"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "a kernel is missing"),
        (
            RuntimeError("CUDA error: an illegal memory access was encountered\nmore"),
            "a device error (CUDA error: an il",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "out of memory on the card"),
    ],
)
def test_a_card_that_fails_while_weights_are_read_is_no_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str, collected: bool
) -> None:
    """Transformers collects what a conversion raises, and raises an error of its own that does not name it."""
    AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()).save_pretrained(tmp_path)
    raised: list[Exception] = [error]

    def convert(self: Any, name: str, *, loading_info: Any, **given: Any) -> Any:
        aside = core_model_loading.log_conversion_errors(name, loading_info, (1, name))
        with aside if collected else contextlib.nullcontext():
            raise raised[0]

    monkeypatch.setattr(core_model_loading.WeightRenaming, "convert", convert)
    with pytest.raises(RuntimeError) as met:
        checkpoints.open_model(Checkpoint("m", tmp_path, "r"), "fp32", "cpu")
    assert failure(met.value).text.startswith(line)
    raised[0] = ValueError("no such shape")  # which is the file's, or the library's
    with pytest.raises(BadFile, match="copy it again"):
        checkpoints.open_model(Checkpoint("m", tmp_path, "r"), "fp32", "cpu")
