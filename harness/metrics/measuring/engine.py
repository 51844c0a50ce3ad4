"""Passes over windows: the NLL of every scored token under a model, and how far two models' predictions lie apart.

The backbone gives hidden states; the head runs on scored positions alone, in slices of at most 32 MiB of fp32 logits,
so the memory of an evaluation does not grow with vocabulary times window. Softmax is in fp32. A model whose logits are
not `head(hidden)` (scaled, soft-capped) is found by a probe, and then asked for whole logits, a window at a time.

Short windows of a text may run two at a time, each on half of a CPU's cores: threads that split a small product wait
for each other at every operation, two forwards beside each other do not.

A window's figure is its own, whatever is scored with it or was before. Windows of several lengths share a batch where a
probe finds that padding moves nothing; where rotary positions follow the longest row (dynamic NTK, LongRoPE), windows
of one length alone do, one forward at a time, from frequencies as they were loaded.

Two models run side by side over the same windows, one at a time, since some methods' numbers depend on the batch; the
slices of both heads together hold no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.core import progress
from harness.core.contracts import Window
from harness.core.stats import spans
from harness.inputs.models.context import text_config
from harness.methods.quantizing.cpu import quick_int8_products, quick_products
from harness.metrics.measuring.decoding import carried

LOGITS_BYTES = 32 * 2**20  # fp32 logits held at once: fills the cores, and glibc keeps blocks up to this for reuse
PROBE_TOKENS = 16  # enough to show a scaled or capped head, and no work
PASS_TOKENS = 512  # of one forward where the batch is chosen: fills two cores, and a window of it runs alone
PADDING = 0  # any id of the vocabulary: it is masked, never attended to, never scored
STREAMS = 2  # forwards at once where a method allows it: more would hold more activations
WINDOW = "a window of text"  # what is being done, as it is told
_splits: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_pads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_growing: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()  # rotary modules that remember the longest


def score(
    model: nn.Module,
    windows: Sequence[Window],
    *,
    device: str,
    batch_size: int = 1,
    concurrent: bool = False,
) -> NDArray[np.float32]:
    """NLL of every scored token.

    Args:
        model: causal, in eval mode, on `device`; a model of transformers, or one that answers alike.
        windows: what to feed and score; those that score nothing are not run.
        device: "cpu" or "cuda".
        batch_size: windows in one forward pass; 0 chooses: as many as PASS_TOKENS holds.
        concurrent: a forward of this model changes nothing of it, so that STREAMS of them may run at once on a CPU.

    Returns:
        (scored tokens,) nats, float32, in window order and left to right within a window.
    """
    places = spans(window.scored for window in windows)
    nll = np.empty(sum(window.scored for window in windows), dtype=np.float32)
    order = sorted(  # longest first, so that the largest batch comes at once; equal lengths share batches
        (index for index, window in enumerate(windows) if window.scored), key=lambda index: -len(windows[index].ids)
    )
    if not order:
        return nll
    with torch.inference_mode(), quick_products(model), quick_int8_products():
        split = splits(model, windows[order[0]].ids[:PROBE_TOKENS], device)
        lengths = [len(windows[index].ids) - 1 for index in order]
        size = batch_size if split else 1
        mixed = size == 1 or len(set(lengths)) == 1 or pads(model, windows[order[0]].ids, device)
        parts = list(batches(lengths, size, mixed=mixed))

        def run(part: slice) -> None:
            progress.note(WINDOW, min(part.stop, len(order)), len(order))
            chosen = order[part]
            scored = batch_nll(model, [windows[index] for index in chosen], device, split)
            for index, span in zip(chosen, spans(windows[index].scored for index in chosen), strict=True):
                nll[places[index]] = scored[span]

        beside: list[slice] = []
        free = concurrent and not follows_length(model)
        if free and device == "cpu" and torch.get_num_threads() >= STREAMS:
            beside = [part for part in parts if lengths[part][0] * len(lengths[part]) <= PASS_TOKENS]
        for part in parts[: len(parts) - len(beside)]:  # the longer ones come first
            run(part)
        in_streams(run, beside)
    return nll


def in_streams(run: Callable[[slice], None], parts: Sequence[slice]) -> None:
    """Run every part, STREAMS at a time, each with its share of this thread's threads; the first error is raised.

    A part that is alone gets no more than its share either: some processors' products differ in the last bits by the
    number of threads, and a window's losses must not depend on what it was scored with.
    """
    threads = torch.get_num_threads()

    def enter() -> None:
        torch.set_num_threads(threads // STREAMS)  # of this worker; torch keeps a number a thread

    def within(part: slice) -> None:
        with torch.inference_mode():  # this too is a thread's own
            run(part)

    if not parts:
        return
    try:
        with ThreadPoolExecutor(STREAMS, "window", initializer=enter) as pool:
            waiting = [pool.submit(within, part) for part in parts]
            try:
                for one in waiting:
                    one.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    finally:
        torch.set_num_threads(threads)


def batches(lengths: Sequence[int], size: int, *, mixed: bool = True) -> Iterator[slice]:
    """Windows that run together, of those in falling order of length: `size` at a time, or by PASS_TOKENS where 0.

    Unless lengths may be `mixed`, a batch ends where the next window is shorter.
    """
    start = 0
    while start < len(lengths):
        step = size or max(1, PASS_TOKENS // lengths[start])
        if not mixed:
            step = sum(length == lengths[start] for length in lengths[start : start + step])
        yield slice(start, start + step)
        start += step


def batch_nll(model: nn.Module, windows: Sequence[Window], device: str, split: bool) -> NDArray[np.float32]:
    """NLL of the scored tokens of windows run together: (sum of scored,), window after window."""
    longest = max(len(window.ids) for window in windows) - 1  # the last id is only predicted
    fed = np.full((len(windows), longest), PADDING, dtype=np.int64)  # (B, L)
    mask = np.zeros((len(windows), longest), dtype=np.int64)  # (B, L)
    scored = np.zeros((len(windows), longest), dtype=bool)  # (B, L)
    for row, window in enumerate(windows):
        length = len(window.ids) - 1
        fed[row, :length] = window.ids[:-1]
        mask[row, :length] = 1
        scored[row, length - window.scored : length] = True
    targets = torch.from_numpy(np.concatenate([window.ids[-window.scored :] for window in windows])).to(device)  # (N,)
    arguments: dict[str, Any] = {"input_ids": torch.from_numpy(fed).to(device), "use_cache": False}
    if not mask.all():
        arguments["attention_mask"] = torch.from_numpy(mask).to(device)
    places = torch.from_numpy(scored).to(device)
    unstretched(model)
    if split:
        hidden = backbone(model)(**arguments).last_hidden_state[places]  # (N, H)
        return sliced_nll(hidden, targets, model.get_output_embeddings())  # type: ignore[operator]
    return sliced_nll(model(**arguments).logits[places], targets, None)


def sliced_nll(rows: Tensor, targets: Tensor, head: Any) -> NDArray[np.float32]:
    """-ln softmax(logits)[target] for each row: (N, H) hidden states and their head, or (N, V) logits and None."""
    width = rows.shape[-1] if head is None else vocabulary(head, rows)
    step = max(1, LOGITS_BYTES // (4 * width))  # 4 bytes an fp32 logit
    losses = []
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        logits = (part if head is None else head(part)).float()  # (n, V)
        picked = logits.gather(-1, targets[start : start + step, None])[:, 0]  # (n,)
        losses.append((_logsumexp(logits, spent=head is not None) - picked).cpu())
    return torch.cat(losses).numpy()


def _logsumexp(logits: Tensor, *, spent: bool) -> Tensor:
    """Compute `logits.logsumexp(-1)`, to the bit, in the logits' own memory where they are `spent`: (n, V) -> (n,)."""
    if not spent:
        return logits.logsumexp(-1)
    largest = logits.amax(-1, keepdim=True)  # (n, 1)
    offset = largest.masked_fill(largest.abs() == torch.inf, 0.0)  # as torch has it: no inf - inf
    return logits.sub_(offset).exp_().sum(-1).log_().add_(offset[:, 0])


def vocabulary(head: Any, rows: Tensor) -> int:
    """Logits a position: what the head declares, else what it gives for one."""
    return int(getattr(head, "out_features", 0) or head(rows[:1]).shape[-1])


def backbone(model: nn.Module) -> nn.Module:
    """The model without its head, by transformers' convention; the model itself where it follows none."""
    inner = getattr(model, "base_model", model)
    return inner if isinstance(inner, nn.Module) else model


def splits(model: nn.Module, ids: NDArray[np.int64], device: str) -> bool:
    """Whether head(backbone(ids)) is model(ids).logits, bit for bit; asked once a model."""
    if model not in _splits:
        _splits[model] = _splits_now(model, torch.from_numpy(ids[None].copy()).to(device))
    return _splits[model]


def _splits_now(model: nn.Module, ids: Tensor) -> bool:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or backbone(model) is model:
        return False
    whole = model(input_ids=ids, use_cache=False).logits  # (1, L, V)
    output = backbone(model)(input_ids=ids, use_cache=False)
    hidden = getattr(output, "last_hidden_state", None)  # (1, L, H)
    fits = hidden is not None and getattr(head, "in_features", hidden.shape[-1]) == hidden.shape[-1]
    return fits and torch.equal(head(hidden), whole)  # RemBERT's head reads what a layer of its own makes of them


def pads(model: nn.Module, ids: NDArray[np.int64], device: str) -> bool:
    """Whether a window keeps its logits when it is padded beside a longer one; asked once a model."""
    if model not in _pads:
        fed = torch.from_numpy(ids[None, :PROBE_TOKENS].copy()).to(device)  # (1, L)
        _pads[model] = not follows_length(model) and _pads_now(model, fed)
    return _pads[model]


def _pads_now(model: nn.Module, ids: Tensor) -> bool:
    half = ids.shape[1] // 2
    if not half:
        return False
    mask = torch.ones_like(ids).repeat(2, 1)  # (2, L)
    mask[0, half:] = 0
    both = torch.cat([ids.where(mask[:1] == 1, PADDING), ids])  # (2, L)
    together = model(input_ids=both, attention_mask=mask, use_cache=False).logits[:1, :half]
    return not moved(model(input_ids=ids[:, :half], use_cache=False).logits, together)


def looks_ahead(model: nn.Module, ids: NDArray[np.int64], device: str) -> bool:
    """Whether a later token moves an earlier prediction, as in a bidirectional model: no likelihood comes of it.

    The second half of a few tokens, ids (L,), is replaced by others of the vocabulary; the logits of the first are
    compared.
    """
    fed = torch.from_numpy(ids[None, :PROBE_TOKENS].copy()).to(device)  # (1, L)
    half, other = fed.shape[1] // 2, fed.clone()
    other[:, half:] = (fed[:, half:] + 1) % (max(1, int(fed.max())) + 1)
    with torch.inference_mode():
        before, after = (model(input_ids=each, use_cache=False).logits[:, :half] for each in (fed, other))
    return moved(before, after)


def moved(before: Tensor, after: Tensor) -> bool:
    """Whether logits differ by more than rounding: by the root of their dtype's epsilon, of the largest of them."""
    limit = torch.finfo(before.dtype).eps ** 0.5 * before.abs().max()
    return bool(((before - after).abs() > limit).any())


def follows_length(model: nn.Module) -> bool:
    """Whether rotary frequencies depend on the longest row of a batch: dynamic NTK and LongRoPE."""
    text = text_config(getattr(model, "config", None))
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [each for each in (rope, *rope.values()) if isinstance(each, dict)]  # one for each type of layer
    names = [str(each.get("rope_type") or each.get("type") or "") for each in kinds]
    return any("dynamic" in name or name in ("longrope", "su") for name in names)


def unstretched(model: nn.Module) -> None:
    """Set rotary frequencies that grew with the longest window so far (dynamic NTK) back to those of a short one."""
    if model not in _growing:
        every = model.modules() if follows_length(model) else ()
        _growing[model] = [module for module in every if hasattr(module, "max_seq_len_cached")]
    for module in _growing[model]:
        for name in [*module._buffers, *vars(module)]:
            prefix, original, _ = name.partition("original_inv_freq")  # before it: a type of layer, where each has one
            if original:
                current = getattr(module, f"{prefix}inv_freq")
                setattr(module, f"{prefix}inv_freq", getattr(module, name).to(current.device).clone())
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


@dataclass(frozen=True)
class Divergence:
    """One entry a scored token, in window order: all (scored tokens,)."""

    kl: NDArray[np.float32]  # nats, KL(reference || candidate) over the vocabulary
    same_top: NDArray[np.bool_]  # both put the same token first
    change: NDArray[np.float32]  # candidate's probability of the true token minus the reference's


def compare_predictions(
    reference: nn.Module, candidate: nn.Module, windows: Sequence[Window], *, device: str
) -> Divergence:
    """Run both models over the windows, one at a time, and compare their predictions at every scored position.

    Args:
        reference: causal, in eval mode, on `device`.
        candidate: the same vocabulary.
        windows: those that score nothing are not run.
        device: "cpu" or "cuda".
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.inference_mode(), quick_products(reference), quick_products(candidate):
        for window in progress.each(WINDOW, windows):
            if window.scored:
                theirs, ours = (scored_rows(model, window, device) for model in (reference, candidate))
                targets = torch.from_numpy(window.ids[-window.scored :].copy()).to(device)  # (k,)
                parts += sliced(theirs, ours, targets)
    kl, same, change = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return Divergence(kl, same, change)


def scored_rows(model: nn.Module, window: Window, device: str) -> tuple[Tensor, Any]:
    """What predicts a window's scored tokens: (k, H) hidden states and the head, or (k, V) logits and None."""
    ids = torch.from_numpy(window.ids[None, :-1].copy()).to(device)  # (1, L - 1): the last id is only predicted
    split = splits(model, window.ids[:PROBE_TOKENS], device)
    unstretched(model)
    if split:
        hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state  # (1, L - 1, H)
        return hidden[0, -window.scored :], model.get_output_embeddings()  # type: ignore[operator]
    return model(input_ids=ids, use_cache=False).logits[0, -window.scored :], None


def sliced(
    reference: tuple[Tensor, Any], candidate: tuple[Tensor, Any], targets: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`divergences` of (k,) positions, a slice of them at a time, on the CPU."""
    rows, head = reference
    width = rows.shape[-1] if head is None else vocabulary(head, rows)
    step = max(1, LOGITS_BYTES // (2 * 4 * width))  # two models, 4 bytes an fp32 logit
    parts = []
    for start in range(0, len(targets), step):
        place = slice(start, start + step)
        theirs, ours = (
            (part[place] if apply is None else apply(part[place])).float()  # (n, V)
            for part, apply in (reference, candidate)
        )
        kl, same, change = divergences(theirs, ours, targets[place])
        parts.append((kl.cpu(), same.cpu(), change.cpu()))
    return parts


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

    Both are decoded token by token, in step, past any end of text, until they differ.

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
    states: list[dict[str, Any]] = [{}, {}]
    for model in (reference, candidate):
        unstretched(model)
    with torch.inference_mode(), quick_products(reference), quick_products(candidate):
        for agreed in progress.each("a continued token", range(new)):
            choices = []
            for side, model in enumerate((reference, candidate)):
                output = model(input_ids=fed, use_cache=True, **states[side])
                states[side] = carried(model, output)
                choices.append(output.logits[:, -1].argmax(-1))  # (1,)
            if choices[0] != choices[1]:
                return agreed
            fed = choices[0][None]  # (1, 1)
    return new
