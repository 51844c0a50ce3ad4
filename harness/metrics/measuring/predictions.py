"""How far a model's predictions lie from its reference's: both run side by side over the same windows.

Memory stays bounded: the heads run on scored positions alone, in slices whose fp32 logits take at most
`engine.LOGITS_BYTES` for both models together. Batch 1, since some methods' numbers depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.core.contracts import Window
from harness.methods.quantizing.cpu import quick_products
from harness.metrics.measuring import engine


@dataclass(frozen=True)
class Divergence:
    """One entry a scored token, in window order: all (scored tokens,)."""

    kl: NDArray[np.float32]  # nats, KL(reference || candidate) over the vocabulary
    same_top: NDArray[np.bool_]  # both put the same token first
    change: NDArray[np.float32]  # candidate's probability of the true token minus the reference's


def compare(reference: nn.Module, candidate: nn.Module, windows: Sequence[Window], *, device: str) -> Divergence:
    """Run both models over the windows, one at a time, and compare their predictions at every scored position.

    Args:
        reference: causal, in eval mode, on `device`.
        candidate: the same vocabulary.
        windows: those that score nothing are not run.
        device: "cpu" or "cuda".
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.inference_mode(), quick_products(reference), quick_products(candidate):
        for window in windows:
            if window.scored:
                theirs, ours = (scored_rows(model, window, device) for model in (reference, candidate))
                targets = torch.from_numpy(window.ids[-window.scored :].copy()).to(device)  # (k,)
                found += sliced(theirs, ours, targets)
    kl, same, change = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return Divergence(kl, same, change)


def scored_rows(model: nn.Module, window: Window, device: str) -> tuple[Tensor, Any]:
    """What predicts a window's scored tokens: (k, H) hidden states and the head, or (k, V) logits and None."""
    ids = torch.from_numpy(window.ids[None, :-1].copy()).to(device)  # (1, L - 1): the last id is only predicted
    if engine.splits(model, window.ids[: engine.PROBE_TOKENS], device):
        hidden = engine.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state  # (1, L - 1, H)
        return hidden[0, -window.scored :], model.get_output_embeddings()  # type: ignore[operator]
    return model(input_ids=ids, use_cache=False).logits[0, -window.scored :], None


def sliced(
    reference: tuple[Tensor, Any], candidate: tuple[Tensor, Any], targets: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`divergences` of (k,) positions, a slice of them at a time, on the CPU."""
    rows, head = reference
    width = rows.shape[-1] if head is None else engine.vocabulary(head, rows)
    step = max(1, engine.LOGITS_BYTES // (2 * 4 * width))  # two models, 4 bytes an fp32 logit
    found = []
    for start in range(0, len(targets), step):
        place = slice(start, start + step)
        theirs, ours = (
            (part[place] if apply is None else apply(part[place])).float()  # (n, V)
            for part, apply in (reference, candidate)
        )
        kl, same, change = divergences(theirs, ours, targets[place])
        found.append((kl.cpu(), same.cpu(), change.cpu()))
    return found


def divergences(reference: Tensor, candidate: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL in nats, agreement of the first choice, and change of the true token's probability.

    KL is summed over p (e^t - 1 - t), t = ln(q / p): no term is below zero, and the part added to -p t is q - p, which
    sums to zero. Rounding of ln p and ln q then enters multiplied by t, where the plain sum takes it whole.

    Args:
        reference: (n, V) fp32 logits that give p.
        candidate: (n, V) that give q.
        targets: (n,) true tokens.

    Returns:
        (n,) each; of equal first choices the lowest id counts.
    """
    ln_p, ln_q = reference.log_softmax(-1), candidate.log_softmax(-1)  # (n, V)
    p, q = ln_p.exp(), ln_q.exp()  # (n, V)
    t = ln_q - ln_p  # (n, V)
    terms = torch.where(t > 1, q - p - p * t, p * (t.expm1() - t))  # the second overflows where q is far above p
    kl = torch.where(p == 0, q, terms).sum(-1)  # (n,) at p = 0, a masked entry's, t is infinite or no number
    same = reference.argmax(-1) == candidate.argmax(-1)  # (n,)
    true = targets[:, None]
    return kl, same, (q.gather(-1, true) - p.gather(-1, true))[:, 0]


def first_divergence(
    reference: nn.Module, candidate: nn.Module, prompt: NDArray[np.int64], new: int, device: str
) -> int:
    """Tokens on which two greedy continuations agree before they part.

    Both are decoded token by token with a cache, in step, past any end of text, until they differ.

    Args:
        reference: causal, on `device`.
        candidate: the same vocabulary.
        prompt: (L,) ids.
        new: tokens to continue by at most.
        device: "cpu" or "cuda".

    Returns:
        0 where the first tokens differ already, `new` where none does.
    """
    fed = torch.from_numpy(prompt[None].copy()).to(device)  # (1, L), later (1, 1)
    caches: list[Any] = [None, None]
    with torch.inference_mode(), quick_products(reference), quick_products(candidate):
        for agreed in range(new):
            choices = []
            for side, model in enumerate((reference, candidate)):
                output = model(input_ids=fed, past_key_values=caches[side], use_cache=True)
                caches[side] = output.past_key_values
                choices.append(output.logits[:, -1].argmax(-1))  # (1,)
            if choices[0] != choices[1]:
                return agreed
            fed = choices[0][None]  # (1, 1)
    return new
