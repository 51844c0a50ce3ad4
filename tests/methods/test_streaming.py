"""Quantizing while reading gives the model that loading whole and then quantizing gives, one weight at a time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from harness.core.contracts import Arguments, Checkpoint, Method, Scope
from harness.core.errors import BadFile
from harness.inputs.models import checkpoints, sizes
from harness.methods import absmax_int8, nf4
from harness.methods.quantizing import stored, streaming
from harness.methods.quantizing.codes import Recipe

IDS = torch.arange(2, 12)[None]
LLAMA: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_head=4, n_layer=2, n_positions=16, initializer_range=0.1),
}


def saved(name: str, folder: Path, **options: Any) -> Checkpoint:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text("{}")
    return Checkpoint(name, folder, "")


def loads(method: Method, checkpoint: Checkpoint, given: Arguments, patch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """(streamed, whole)"""

    def refuse(*args: Any) -> Any:
        raise AssertionError("loaded whole")

    with patch.context() as within:
        within.setattr(checkpoints, "open_model", refuse)
        streamed = method.load(checkpoint, given, "cpu")
    with patch.context() as within:
        within.setattr(streaming, "quantized_model", lambda *args: None)
        return streamed, method.load(checkpoint, given, "cpu")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("part", ["linear", "all"])
@pytest.mark.parametrize("method", [absmax_int8.METHOD, nf4.METHOD], ids=lambda method: method.name)
@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_is_loaded_and_then_quantized(
    name: str, method: Method, part: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {key: parameter.default for key, parameter in method.parameters.items()}
    checkpoint = saved(name, tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    streamed, whole = loads(method, checkpoint, Arguments(dtype, Scope(part), values), monkeypatch)
    ours, theirs = streamed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    buffers = dict(whole.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in streamed.named_buffers())
    assert sizes.measure(streamed) == sizes.measure(whole)
    assert torch.equal(streamed(IDS).logits, whole(IDS).logits)
    assert not streamed.training
    learnable = [{key: one.requires_grad for key, one in model.named_parameters()} for model in (streamed, whole)]
    assert learnable[0] == learnable[1]


def test_one_weight_at_a_time_is_unquantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, most, kept = saved("llama", tmp_path), [], stored.StoredWeight.__init__

    def counting(self: Any, *given: Any) -> None:
        linear = [child for child in built[0].modules() if isinstance(child, torch.nn.Linear)]
        most.append(sum(not child.weight.is_meta for child in linear if child is not built[0].lm_head))
        kept(self, *given)

    built: list[Any] = []
    sketch = checkpoints.sketch_model

    def building(*args: Any, **options: Any) -> Any:
        built.append(sketch(*args, **options))
        return built[-1]

    monkeypatch.setattr(checkpoints, "sketch_model", building)
    monkeypatch.setattr(stored.StoredWeight, "__init__", counting)
    absmax_int8.METHOD.load(checkpoint, Arguments("fp32", Scope(), {}), "cpu")
    assert most == [1] * 14


@pytest.mark.parametrize("change", ["renamed", "missing", "shape", "unknown dtype"])
def test_what_is_not_the_architectures_own_layout_is_left_to_transformers(change: str, tmp_path: Path) -> None:
    checkpoint = saved("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = tensors.pop(name)
    if change == "renamed":
        tensors[name.removeprefix("model.")] = tensor
    elif change == "shape":
        tensors[name] = tensor[:-1].clone()
    elif change == "unknown dtype":
        tensors[name] = tensor.to(torch.float8_e5m2)
    save_file(tensors, file, metadata={"format": "pt"})
    recipe = Recipe("absmax-int8", absmax_int8.CODES)
    assert streaming.quantized_model(checkpoint, "fp32", recipe, lambda model: []) is None


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    places = streaming.places([file])
    assert places is not None
    last = max(places.values(), key=lambda place: place.offset)
    file.write_bytes(file.read_bytes()[:-4])
    for mapped in (False, True):
        with pytest.raises(BadFile, match=r"model\.safetensors ends before its last tensor"):
            last.tensor(mapped)


def test_a_mapped_tensor_is_the_one_that_is_read(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    places = streaming.places([tmp_path / "model.safetensors"])
    assert places is not None
    for place in places.values():
        assert torch.equal(place.tensor(mapped=True), place.tensor(mapped=False))
        odd = replace(place, offset=place.offset - 1)  # no multiple of the dtype's size: read, as bytes lie
        assert torch.equal(odd.tensor(mapped=True).view(torch.uint8), odd.tensor(mapped=False).view(torch.uint8))


def test_what_comes_next_is_on_its_way_and_each_tensor_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [streaming.Place(tmp_path / "x", 4 * at, torch.float32, (at,)) for at in (1, 2, 3, 4, 5)]
    asked: list[int] = []
    monkeypatch.setattr(streaming.Place, "expect", lambda place: asked.append(place.shape[0]))
    monkeypatch.setattr(streaming, "AHEAD", 20)  # bytes: five numbers
    queue, seen = streaming.in_turn(wanted), []
    for place in wanted:
        assert next(queue) is place
        seen.append(asked.copy())
    assert seen == [[1, 2, 3], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]
    (tmp_path / "x").write_bytes(bytes(100))
    monkeypatch.undo()
    wanted[-1].expect()  # advice: the system may take it or not
