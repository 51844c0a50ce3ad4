"""Small random models of the GGUF architectures with made-up tokenizers, and GGUF files as other programs write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from harness.core.contracts import Checkpoint
from harness.inputs.models.gguf_format import file, hyperparameters, tokenizers

VOCABULARY = 320
TEXT = "the cat sat on the mat, then on 12 other mats"
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MERGES = ("t h", "a t", "th e", "\u0120 c", "\u0120 m", "\u0120 t", "\u0120t h", "o n", "\u0120m at", "\u0120th e")


def byte_level(*, digits: bool = False, normalize: bool = False) -> PreTrainedTokenizerFast:
    """256 bytes and ten merges; GPT-2's splitting, digits apart on request, NFC on request."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
    words = ["<|end|>", *alphabet, *("".join(merge) for merge in merges)]
    core = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    split: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    core.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if normalize:
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|end|>", eos_token="<|end|>")


def sentencepiece(*, drop_last_merge: bool = False) -> PreTrainedTokenizerFast:
    """A vocabulary as SentencePiece makes them: unknown, begin, end, 256 bytes, pieces by falling score."""
    blank = tokenizers.SPACE
    pieces = ["th", "the", f"{blank}the", "at", f"{blank}m", f"{blank}mat", "on", blank, *"abcdehimnorst,"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [tokenizers.CONTROL] * 3 + [tokenizers.BYTE] * 256 + [tokenizers.NORMAL] * len(pieces)
    merges = tokenizers.sentencepiece_merges(words, [-float(number) for number in range(len(words))], kinds)
    merges = merges[: len(merges) - drop_last_merge]
    vocabulary = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend(blank), normalizers.Replace(" ", blank)])
    core.decoder = decoders.Sequence(
        [decoders.Replace(blank, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(word, normalized=False) for word in words[:3]])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def word_level() -> PreTrainedTokenizerFast:
    """Three words, of which GGUF has no kind."""
    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<unk>": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="a", eos_token="a")


def _llama(**more: Any) -> Any:
    config = transformers.LlamaConfig(**{**SHAPE, "num_key_value_heads": 2, "attention_bias": True, **more})
    return transformers.LlamaForCausalLM(config)


def _gpt2(**more: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, **more
    )
    return transformers.GPT2LMHeadModel(config)


def _olmo(**more: Any) -> Any:
    config = transformers.OlmoConfig(
        **{**SHAPE, "pad_token_id": None, "clip_qkv": 8.0, "tie_word_embeddings": False, **more}
    )
    return transformers.OlmoForCausalLM(config)


def _phi3(**more: Any) -> Any:
    config = transformers.Phi3Config(
        **{
            **SHAPE,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "original_max_position_embeddings": 128,
            "sliding_window": 127,
            "tie_word_embeddings": False,
            **more,
        }
    )
    return transformers.Phi3ForCausalLM(config)


def _granite(**more: Any) -> Any:
    scales = {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5}
    shape = {**SHAPE, "num_key_value_heads": 2, "attention_multiplier": 0.125, **scales, **more}
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**shape))


MADE_UP: dict[str, tuple[Callable[..., Any], Callable[[], PreTrainedTokenizerFast]]] = {
    "llama": (_llama, lambda: byte_level(digits=True)),
    "gpt2": (_gpt2, byte_level),
    "olmo": (_olmo, lambda: byte_level(normalize=True)),
    "phi3": (_phi3, sentencepiece),
    "granite": (_granite, byte_level),
}


def save(name: str, folder: Path, *, spoil: bool = False, sharpen: float = 1, **shape: Any) -> Checkpoint:
    """A random model of a family as a plain folder; `spoil` puts a NaN into it, `sharpen` scales its head."""
    torch.manual_seed(0)
    build, tokenizer = MADE_UP[name]
    model = build(**shape)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that a forgotten one shows
            parameter += 0.05 * torch.randn_like(parameter)
        model.get_output_embeddings().weight.mul_(sharpen)
        if spoil:
            model.get_input_embeddings().weight[0, 0] = float("nan")
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Checkpoint(f"path:{folder}", folder, "made up")


def rewritten(source: Path, target: Path, keys: Mapping[str, Any], tensors: Mapping[str, Any] = {}) -> Path:
    """A GGUF file with further entries below its architecture's name (None takes one out) and further fp32 tensors."""
    old = file.GgufFile(source)
    name = old.metadata["general.architecture"]
    writer = gguf.GGUFWriter(target, name)
    for key, value in {**old.metadata, **{f"{name}.{key}": value for key, value in keys.items()}}.items():
        if key != "general.architecture" and value is not None and value != []:
            form = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, form)
    for key, tensor in old.tensors.items():
        writer.add_tensor(key, tensor.dequantize())
    for key, values in tensors.items():
        writer.add_tensor(key, np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def by_converter(source: Path, target: Path, architecture: str, more: Mapping[str, Any] = {}) -> Path:
    """A folder's model as llama.cpp's converter names it, fp32, without a tokenizer of its own kind (its JSON)."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    row = hyperparameters.KNOWN[architecture]
    writer = gguf.GGUFWriter(target, architecture)
    config = model.config
    facts = {key: getattr(config, name, None) for key, name in {**row.facts, **row.optional}.items()}
    rope = getattr(config, "rope_parameters", None) or {}
    facts |= {"rope.freq_base": (rope.get("full_attention") or rope).get("rope_theta")}
    facts |= {"rope.dimension_count": None, **more}
    for key, value in facts.items():
        if value is not None:
            form = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
            writer.add_key_value(f"{architecture}.{key}", value, form)
    writer.add_string("tokenizer.ggml.model", "none")
    writer.add_string(tokenizers.WHOLE, byte_level().backend_tokenizer.to_str())
    arch = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for theirs, parameter in model.named_parameters():  # a tied one once
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert name is not None, theirs
        added = 1 if architecture in ("gemma2", "gemma3", "nemotron") and "norm.weight" in name else 0
        writer.add_tensor(name, np.ascontiguousarray(parameter.detach().numpy() + np.float32(added)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


SIZES: dict[str, Any] = {  # of a small model of any architecture
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 128,
    "block_count": 2,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.scale": 0.25,
    "embedding_scale": 12.0,
    "residual_scale": 0.22,
    "logit_scale": 8.0,
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_feed_forward_length": 16,
    "expert_shared_feed_forward_length": 24,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 64,
    "ssm.state_size": 6,
    "ssm.time_step_rank": 3,
}


class Shaped:
    """A tensor of which the shape alone is looked at, and the values of factors."""

    def __init__(self, *shape: int, values: Sequence[float] = ()) -> None:
        self.shape, self.values = shape, values

    def dequantize(self) -> Any:
        return np.array(self.values, np.float32)


def stated(architecture: str, more: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The metadata of such a model, as far as a file must state them; `more`: further keys below its name."""
    keys = {key: SIZES[key] for key in hyperparameters.KNOWN[architecture].facts}
    keys |= {"attention.head_count_kv": 1} if architecture == "falcon" else {}
    keys |= more
    return {"general.architecture": architecture, **{f"{architecture}.{key}": value for key, value in keys.items()}}


TENSORS = {name: Shaped(48, 32) for name in ("token_embd.weight", "output_norm.weight", "blk.0.x", "blk.1.x")}

# every key below an architecture's name that the gguf package names
NAMED = sorted(
    {
        value.removeprefix("{arch}.")
        for holder in (
            gguf.Keys.LLM,
            gguf.Keys.Attention,
            gguf.Keys.Attention.Indexer,
            gguf.Keys.Rope,
            gguf.Keys.SSM,
            gguf.Keys.WKV,
            gguf.Keys.ShortConv,
            gguf.Keys.Classifier,
        )
        for value in vars(holder).values()
        if isinstance(value, str) and value.startswith("{arch}.")
    }
)
