"""GGUF files into plain model folders: fp32 safetensors, config.json, tokenizer.json.

Llama-shaped files with a byte-level vocabulary (SmolLM2 is one) are converted here directly, in seconds; whatever else
a file holds, its weights or its tokenizer go through transformers, which takes about a minute.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from harness import weightfiles
from harness.errors import BadFile
from harness.gguf_file import GgufFile

VERSION = 1  # of the conversion: part of the cache's key
GRIDS = {"Q4_0": "affine4:32", "Q4_1": "affine4:32"}  # values d (q - 8) and d q + m: both affine 4-bit grids
STORED = {
    "Q4_0": "Q4_0, symmetric 4-bit in blocks of 32,",
    "Q4_1": "Q4_1, affine 4-bit in blocks of 32,",
}
PLAIN = ("F32", "F16", "BF16")  # not quantized
CONTROL = 3  # token type of special tokens
SPLITS_DIGITS = {"smollm": True, "gpt-2": False}  # pre-tokenizers known here; else GPT-2's regular expression both
LLAMA_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LLAMA_CONFIG = {
    "llama.vocab_size": "vocab_size",
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.block_count": "num_hidden_layers",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.context_length": "max_position_embeddings",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.rope.freq_base": "rope_theta",
    "llama.rope.dimension_count": "head_dim",
}
TOKENS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}


def convert(path: Path, destination: Path) -> dict[str, str]:
    """Write a GGUF file's model into the folder `destination`.

    Returns {'note', 'grid'}: what a reader must know of how the weights were stored, and the quantization grid that
    most of them lie on ('' for none). BadFile where neither this module nor transformers can read the file.
    """
    file = GgufFile(path)
    if is_plain_llama(file):
        write_llama(file, destination)
    else:
        _through_transformers(path, destination)
    if has_plain_tokenizer(file):
        write_tokenizer(file, destination)
    else:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(destination)
    return _facts(file)


def _facts(file: GgufFile) -> dict[str, str]:
    elements: Counter[str] = Counter()
    for name, tensor in file.tensors.items():
        if name.startswith("blk."):
            elements[tensor.kind] += int(np.prod(tensor.shape))
    kind = elements.most_common(1)[0][0] if elements else "F32"
    if kind in PLAIN:
        return {"note": "", "grid": ""}
    stored = STORED.get(kind, f"{kind},")
    return {
        "note": f"weights were stored as {stored} before they became this fp32 reference",
        "grid": GRIDS.get(kind, ""),
    }


def is_plain_llama(file: GgufFile) -> bool:
    """Whether every tensor and every architecture fact of the file is known here, so that nothing is left out."""
    facts = {key for key in file.metadata if key.startswith("llama.")}
    return (
        file.metadata.get("general.architecture") == "llama"
        and "mistral" not in str(file.metadata.get("general.name", "")).lower()  # its attention window is not stated
        and facts == set(LLAMA_CONFIG)
        and all(_llama_name(name) for name in file.tensors)
    )


def _llama_name(name: str) -> str:
    """The name of a tensor in transformers' Llama, '' if it has none."""
    if name in LLAMA_OUTER:
        return LLAMA_OUTER[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in LLAMA_INNER or parts[3] != "weight":
        return ""
    return f"model.layers.{parts[1]}.{LLAMA_INNER[parts[2]]}.weight"


def write_llama(file: GgufFile, destination: Path) -> None:
    """Write config.json and model.safetensors of a Llama-shaped file; a head that is not stored is tied."""
    facts = {name: file.metadata[key] for key, name in LLAMA_CONFIG.items()}
    rope = {"rope_type": "default", "rope_theta": facts.pop("rope_theta")}
    specials = {f"{name}_token_id": file.metadata.get(key) for name, key in TOKENS.items() if name != "unk"}
    tied = "output.weight" not in file.tensors
    config = LlamaConfig(**facts, **specials, rope_parameters=rope, tie_word_embeddings=tied, dtype="float32")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(destination)
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    state = {}
    for name, tensor in file.tensors.items():
        weight = tensor.dequantize()
        for part, count in heads.items():
            if part in name:
                weight = halves_apart(weight, count)
        state[_llama_name(name)] = torch.from_numpy(np.array(weight, order="C"))  # a copy: the file is read-only
    save_file(state, destination / "model.safetensors", metadata={"format": "pt"})


def halves_apart(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder a query or key projection's rows from GGUF's rotary layout to transformers'.

    GGUF interleaves the two halves that a rotation mixes (x0 y0 x1 y1 ...); transformers keeps them apart
    (x0 x1 ... y0 y1 ...). weight: (heads * head_dim, in).
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)  # (head, pair, half, in)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def has_plain_tokenizer(file: GgufFile) -> bool:
    """Whether the vocabulary is byte-level BPE with a splitting rule known here, and adds no token of itself."""
    facts = file.metadata
    return (
        facts.get("tokenizer.ggml.model") == "gpt2"
        and facts.get("tokenizer.ggml.pre") in SPLITS_DIGITS
        and not facts.get("tokenizer.ggml.add_bos_token")
        and not facts.get("tokenizer.ggml.add_eos_token")
    )


def write_tokenizer(file: GgufFile, destination: Path) -> None:
    """Write tokenizer.json of a byte-level vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    facts = file.metadata
    words: list[str] = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in facts["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    split: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if SPLITS_DIGITS[facts["tokenizer.ggml.pre"]]:
        split.insert(0, pre_tokenizers.Digits(individual_digits=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(split)
    core.decoder = decoders.ByteLevel()
    kinds = facts.get("tokenizer.ggml.token_type", [])
    core.add_special_tokens(
        [AddedToken(word, normalized=False) for word, kind in zip(words, kinds, strict=False) if kind == CONTROL]
    )
    specials = {f"{name}_token": words[facts[key]] for name, key in TOKENS.items() if key in facts}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **specials)
    tokenizer.chat_template = facts.get("tokenizer.chat_template")
    tokenizer.save_pretrained(destination)


def _through_transformers(path: Path, destination: Path) -> None:
    """Any architecture that transformers reads; a model loaded from GGUF refuses to be saved, so a fresh one is."""
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        detail = str(error).splitlines()[0]
        raise BadFile(f"{path} holds a model that transformers does not read from GGUF ({detail})") from error
    weightfiles.require_match(report, f"the weights in {path}, as transformers reads them,")
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    with torch.device("meta"):  # no random weights: every tensor is put in place below
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.save_pretrained(destination)
