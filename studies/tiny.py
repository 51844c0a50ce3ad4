"""The tiny models `tiny-gpt2` and `tiny-olmo`, never quantized, with a known floor: how their weights were made.

`python -m studies.tiny` trains both and writes them as plain folders in fp16 into `harness/inputs/models/tiny`, which
the package ships: weights trained elsewhere have other bits, and then no recorded figure holds.

`gpt2` has Conv1D weights, learned positions and a tied head; `olmo` has Linear weights, a SwiGLU, non-parametric norms,
rotary positions and an untied head. Both learn the order-2 language of `synthetic` by cross-entropy against
its exact next-word distribution rather than against drawn words, which takes the sampling noise out of the gradient
(Hinton et al. 2015, arXiv:1503.02531, with the language itself as the teacher). One training thread and deterministic
kernels: equal seeds give equal bits on one machine, however many cores are busy.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, OlmoConfig, OlmoForCausalLM, PreTrainedTokenizerFast

from harness.inputs.models.names import TINY, TINY_HOME
from harness.inputs.texts import synthetic

WIDTH = 128  # a multiple of 64, so that blocks of 64 divide every row
LAYERS = 2  # one to fetch the word before the last, one to combine the two
HEADS = 2
CONTEXT = 256  # tokens
SPECIALS = ("<unk>", "<eos>")
VOCABULARY = (*synthetic.WORDS, *SPECIALS)  # 64 tokens
EOS = VOCABULARY.index("<eos>")
SHORTEST_PERIOD = 2 * math.pi  # of the sinusoids that positions start from, in tokens
PERIOD_RATIO = 30.0  # longest over shortest period: the neighbour stays distinguishable in every dimension
POSITION_SCALE = 0.05  # amplitude: of the size of the token embeddings, so that neither drowns the other
ROPE_BASE = 100.0  # the language looks two tokens back: fast rotations tell neighbours apart


@dataclass(frozen=True)
class Schedule:
    """How a tiny model is trained; the defaults are of what the package ships."""

    steps: int = 160
    tokens: int = 1024  # a step
    short: int = 8  # tokens of the first phase's windows: few keys, so attention finds the neighbour soon
    short_share: float = 0.6  # of the steps
    rate: float = 5e-3  # peak of AdamW's learning rate
    warmup: float = 0.1  # share of the steps over which the rate rises; it then falls to zero linearly
    seed: int = 0


DEFAULT = Schedule()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the synthetic language; nothing is added of itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<eos>", eos_token="<eos>")


def untrained(architecture: str) -> nn.Module:
    """The model ('gpt2' or 'olmo') before its first step, drawn from torch's random state."""
    if architecture == "olmo":
        return OlmoForCausalLM(  # type: ignore[no-any-return]
            OlmoConfig(
                vocab_size=len(VOCABULARY),
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                max_position_embeddings=CONTEXT,
                rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
                tie_word_embeddings=False,
                bos_token_id=EOS,
                eos_token_id=EOS,
                pad_token_id=None,
            )
        )
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(VOCABULARY),
            n_positions=CONTEXT,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=EOS,
            eos_token_id=EOS,
        )
    )
    # sinusoids (Vaswani et al. 2017, section 3.5): a shift by one token is then a rotation, which one head can learn
    frequencies = 2 * math.pi / SHORTEST_PERIOD * PERIOD_RATIO ** -torch.arange(0, 1, 2 / WIDTH)  # (WIDTH / 2,)
    angles = torch.arange(CONTEXT)[:, None] * frequencies  # (CONTEXT, WIDTH / 2)
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(POSITION_SCALE * torch.cat([angles.sin(), angles.cos()], dim=1))
    return model  # type: ignore[no-any-return]


def teacher() -> torch.Tensor:
    """P(next | word before the last, last) over tokens: (64, 64, 64) fp32; a row of <eos> stands for no word.

    So [<eos>, b] is P(c | b) at the start of a text, and [<eos>, <eos>] the words' stationary distribution.
    """
    size, words = len(VOCABULARY), len(synthetic.WORDS)
    pairs = torch.from_numpy(synthetic.stationary())  # (V, V)
    table = torch.zeros(size, size, size)
    table[:words, :words, :words] = torch.from_numpy(synthetic.transitions()).float()
    table[EOS, :words, :words] = (pairs / pairs.sum(dim=1, keepdim=True)).float()
    table[EOS, EOS, :words] = pairs.sum(dim=0).float()
    table[:words, EOS, :words] = table[EOS, EOS, :words]
    return table


@contextlib.contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """One thread, deterministic kernels and a random state of our own; what was set before is restored."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        torch.set_num_threads(1)  # two threads gain a quarter on idle cores and lose fourfold on busy ones
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict)
            torch.set_num_threads(threads)


def train(architecture: str, schedule: Schedule = DEFAULT) -> nn.Module:
    """Train a tiny model ('gpt2' or 'olmo') on the synthetic language: fp32, CPU, in eval mode when done."""
    words = synthetic.word_ids(schedule.steps * schedule.tokens, synthetic.TRAINING_SEED)
    batches = torch.tensor(words).view(schedule.steps, schedule.tokens)
    with reproducible(schedule.seed):
        model, table = untrained(architecture), teacher()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        model.train()
        warm = max(1, round(schedule.warmup * schedule.steps))
        for step, batch in enumerate(batches):
            ramp = min((step + 1) / warm, (schedule.steps - step) / max(1, schedule.steps - warm), 1.0)
            optimizer.param_groups[0]["lr"] = schedule.rate * ramp
            length = schedule.short if step < schedule.short_share * schedule.steps else CONTEXT
            loss = _loss(model, batch.view(-1, length), table)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval()


def _loss(model: Any, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of the model's next-token distribution against the language's, over ids (B, L)."""
    starts = torch.full((len(ids), 1), EOS)
    marked = torch.cat([starts, ids[:, :-1]], dim=1)  # (B, L)
    half = len(ids) // 2  # every other text opens with <eos>, as some protocols feed it
    ids = torch.cat([marked[:half], ids[half:]])
    earlier = torch.cat([starts, ids[:, :-1]], dim=1)  # the word before each, (B, L)
    offsets = torch.randint(0, CONTEXT - ids.shape[1] + 1, (len(ids), 1))  # short windows lie anywhere in the context
    logits = model(input_ids=ids, position_ids=offsets + torch.arange(ids.shape[1])).logits  # (B, L, 64)
    return cross_entropy(logits.flatten(0, 1), table[earlier, ids].flatten(0, 1))


def build(architecture: str, destination: Path, schedule: Schedule = DEFAULT) -> None:
    """Train and save a tiny model as a plain folder: config.json, model.safetensors (fp16), tokenizer.json."""
    model: Any = train(architecture, schedule)
    model.half().save_pretrained(destination)
    tokenizer().save_pretrained(destination)


if __name__ == "__main__":
    for name in TINY:
        build(name, TINY_HOME / name)
