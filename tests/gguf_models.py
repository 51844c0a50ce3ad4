"""Small random models of the four GGUF architectures with made-up tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from harness.core.contracts import Checkpoint
from harness.inputs.models.gguf_format import tokenizers

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


MADE_UP: dict[str, tuple[Callable[..., Any], Callable[[], PreTrainedTokenizerFast]]] = {
    "llama": (_llama, lambda: byte_level(digits=True)),
    "gpt2": (_gpt2, byte_level),
    "olmo": (_olmo, lambda: byte_level(normalize=True)),
    "phi3": (_phi3, sentencepiece),
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
