"""A model that needs its BOS, built by hand: `tiny-olmo` with one more attention head that rests on BOS.

Trained language models park the attention of heads that have nothing to do on the first token, most strongly on BOS
(attention sinks: Xiao et al. 2023, arXiv 2309.17453). The tiny models learn no such thing, so the mechanism is put in:
in the first layer every position asks for BOS, whose value is nothing; without one the same head spreads over the
words, whose value is a constant that disturbs the stream.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import OlmoForCausalLM

from harness.core.contracts import Checkpoint
from harness.core.options import Declared
from harness.core.specification import parse
from harness.inputs.models import checkpoints
from harness.inputs.texts import corpora, protocols
from harness.published.pitfalls import perplexity
from studies import tiny
from studies.pitfalls.bench import Bench, Shown, mean

WIDTH = 64  # tokens a window: the head's slowest rotation has then turned by 0.7 of a radian
SCORE = 400.0  # q . k for BOS before the division by sqrt(64): over 30 after it and after that rotation
DISTURBANCE = (
    10.0  # norm of the constant over the mean norm of an embedding: sink states of trained models are outliers
)


def with_sink(model: Any) -> Any:
    """`tiny-olmo` with a third head of 64 in each layer: the sink in the first, idle in the second."""
    config = copy.deepcopy(model.config)
    size = config.hidden_size // config.num_attention_heads  # 64
    config.head_dim = size
    config.num_attention_heads = config.num_key_value_heads = config.num_attention_heads + 1
    wider: Any = OlmoForCausalLM(config)
    wider.load_state_dict({name: _wider(name, tensor, size) for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        _install(wider, size)
    return wider.requires_grad_(False).eval()


def _wider(name: str, weight: Tensor, size: int) -> Tensor:
    """Room for one more head, all 0: rows of q, k and v, columns of o."""
    if any(part in name for part in ("q_proj", "k_proj", "v_proj")):
        return torch.cat([weight, weight.new_zeros(size, weight.shape[1])])  # (3 * 64, 128)
    if "o_proj" in name:
        return torch.cat([weight, weight.new_zeros(weight.shape[0], size)], dim=1)  # (128, 3 * 64)
    return weight


def _install(model: Any, size: int) -> None:
    """Write the sink head: exact, since 64 embeddings in 128 dimensions are linearly independent."""
    layer = model.model.layers[0]
    embedding = model.get_input_embeddings().weight  # (64, 128)
    seen = layer.input_layernorm(embedding).double()  # (64, 128), what the head reads
    duals = torch.linalg.pinv(seen).T.float()  # (64, 128): duals[i] . seen[j] is 1 where i = j, else 0
    everything, bos = duals.sum(dim=0), duals[tiny.EOS]  # 1 for any token; 1 for BOS alone
    slowest = size // 2 - 1  # of the head's rotations, which pair dimension i with i + 32
    first = layer.self_attn.q_proj.weight.shape[0] - size  # of the new head's rows
    layer.self_attn.q_proj.weight[first + slowest] = SCORE**0.5 * everything
    layer.self_attn.k_proj.weight[first + slowest] = SCORE**0.5 * bos
    layer.self_attn.v_proj.weight[first] = everything - bos  # 0 for BOS, 1 for a word
    direction = torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(0))
    direction *= DISTURBANCE * embedding.norm(dim=1).mean() / direction.norm()
    layer.self_attn.o_proj.weight[:, first] = direction


def leading_tokenizer() -> Any:
    """The tiny models' tokenizer, made to put <eos> before every text, as tokenizers with a BOS do."""
    from tokenizers.processors import TemplateProcessing

    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", tiny.EOS)])
    return made


def _tiny_olmo() -> Checkpoint:
    return checkpoints.materialise(parse("tiny-olmo"), Declared(Path()))


def missing_bos_made(bench: Bench) -> Shown:
    """The same on a model made for it: one more head in `tiny-olmo`, which rests on BOS and has nowhere else to go.

    Without BOS it writes a constant into every position. What a trained model does a little is here done on purpose,
    and how much it loses was chosen: see `studies.pitfalls.sink`.
    """
    plain: Any = checkpoints.open_model(_tiny_olmo(), "fp32", "cpu")
    model = with_sink(plain)
    corpus = corpora.read(parse("synthetic"), Declared(Path()))

    def plan(tokenizer: Any) -> Any:
        protocol = protocols.parse(parse(f"chunk:{WIDTH}"))
        return protocols.plan(corpus, protocol, tokenizer, context=WIDTH, max_tokens=bench.max_tokens)

    def figures(tokenizer: Any) -> dict[str, float]:
        windows = plan(tokenizer).windows
        nll = bench.nll(model, windows)
        return {
            "perplexity": perplexity(nll),
            "without the sink head": perplexity(bench.nll(plain, windows)),
            "mean NLL, nat": mean(nll),
            "tokens scored": len(nll),
        }

    return Shown(figures(tiny.tokenizer()), figures(leading_tokenizer()))
