"""The hot path: the NLL of every scored token of a list of windows under a causal model.

The backbone gives hidden states; the head runs on scored positions alone, in slices of at most 32 MiB of fp32 logits,
so the memory of an evaluation does not grow with vocabulary times window. Softmax is in fp32. A model whose logits are
not `head(hidden)` (scaled, soft-capped) is found by a probe, and then asked for whole logits, a window at a time.

Short windows of a text may run two at a time, each on half of a CPU's cores: threads that split a small product wait
for each other at every operation, two forwards beside each other do not.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from harness.contracts import Window

LOGITS_BYTES = 32 * 2**20  # fp32 logits held at once: fills the cores, and glibc keeps blocks up to this for reuse
PROBE_TOKENS = 16  # enough to show a scaled or capped head, and no work
NATIVE = {  # instruction sets with products in a half precision; without them torch's half GEMM is 5 to 10 times slower
    torch.float16: frozenset({"avx512_fp16", "amx_fp16", "asimdhp"}),
    torch.bfloat16: frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
}
PASS_TOKENS = 512  # of one forward where the batch is chosen: fills two cores, and a window of it runs alone
STREAMS = 2  # forwards at once where a method allows it: more would hold more activations
INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})  # int8 dot products in hardware
INT8_DEPTH = 1023  # products of int8 that fp32 sums exactly: 1023 * 128 * 128 < 2^24
_splits: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def score(
    model: nn.Module,
    windows: Sequence[Window],
    *,
    device: str,
    batch_size: int = 1,
    padding_id: int = 0,
    concurrent: bool = False,
) -> NDArray[np.float32]:
    """NLL of every scored token.

    Args:
        model: causal, in eval mode, on `device`; a model of transformers, or one that answers alike.
        windows: what to feed and score; those that score nothing are not run.
        device: "cpu" or "cuda".
        batch_size: windows in one forward pass; 0 chooses: as many as PASS_TOKENS holds.
        padding_id: any id of the vocabulary; padding is masked, never attended to, never scored.
        concurrent: a forward of this model changes nothing of it, so that STREAMS of them may run at once on a CPU.

    Returns:
        (scored tokens,) nats, float32, in window order and left to right within a window.
    """
    ends = np.cumsum([window.scored for window in windows], dtype=np.int64)
    nll = np.empty(int(ends[-1]) if len(windows) else 0, dtype=np.float32)
    order = sorted(  # longest first, so that the largest batch comes at once; equal lengths share batches
        (index for index, window in enumerate(windows) if window.scored), key=lambda index: -len(windows[index].ids)
    )
    if not order:
        return nll
    with torch.inference_mode(), fp32_products(model), quick_int8_products():
        split = splits(model, windows[order[0]].ids[:PROBE_TOKENS], device)
        lengths = [len(windows[index].ids) - 1 for index in order]
        parts = list(batches(lengths, batch_size if split else 1))

        def run(part: slice) -> None:
            chosen = order[part]
            scored = batch_nll(model, [windows[index] for index in chosen], device, padding_id, split)
            pieces = np.split(scored, np.cumsum([windows[index].scored for index in chosen])[:-1])
            for index, piece in zip(chosen, pieces, strict=True):
                nll[ends[index] - windows[index].scored : ends[index]] = piece

        beside: list[slice] = []
        if concurrent and device == "cpu" and torch.get_num_threads() >= STREAMS:
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


def batches(lengths: Sequence[int], size: int) -> Iterator[slice]:
    """Windows that run together, of those in falling order of length: `size` at a time, or by PASS_TOKENS where 0."""
    start = 0
    while start < len(lengths):
        step = size or max(1, PASS_TOKENS // lengths[start])
        yield slice(start, start + step)
        start += step


def batch_nll(
    model: nn.Module, windows: Sequence[Window], device: str, padding_id: int, split: bool
) -> NDArray[np.float32]:
    """NLL of the scored tokens of windows run together: (sum of scored,), window after window."""
    longest = max(len(window.ids) for window in windows) - 1  # the last id is only predicted
    fed = np.full((len(windows), longest), padding_id, dtype=np.int64)  # (B, L)
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
    if split:
        hidden = backbone(model)(**arguments).last_hidden_state[places]  # (N, H)
        return sliced_nll(hidden, targets, model.get_output_embeddings())  # type: ignore[operator]
    return sliced_nll(model(**arguments).logits[places], targets, None)


def sliced_nll(rows: Tensor, targets: Tensor, head: Any) -> NDArray[np.float32]:
    """-ln softmax(logits)[target] for each row: (N, H) hidden states and their head, or (N, V) logits and None."""
    width = rows.shape[-1] if head is None else vocabulary(head, rows)
    step = max(1, LOGITS_BYTES // (4 * width))  # 4 bytes an fp32 logit
    found = []
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        logits = (piece if head is None else head(piece)).float()  # (n, V)
        picked = logits.gather(-1, targets[start : start + step, None])[:, 0]  # (n,)
        found.append((_logsumexp(logits, spent=head is not None) - picked).cpu())
    return torch.cat(found).numpy()


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
    return hidden is not None and torch.equal(head(hidden), whole)


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The processor's instruction sets as Linux names them; empty where it does not say."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return frozenset()
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in {"flags", "Features"}:  # x86, ARM
            return frozenset(value.split())
    return frozenset()


def native(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of the dtype in hardware; fp32 always."""
    return dtype not in NATIVE or bool(NATIVE[dtype] & cpu_flags())


def linear_in_fp32(module: Any, x: Tensor) -> Tensor:
    """The nn.Linear x W^T + b: half inputs, fp32 products and sums, one rounding."""
    if x.dtype != module.weight.dtype:
        return nn.Linear.forward(module, x)
    bias = None if module.bias is None else module.bias.float()
    return functional.linear(x.float(), module.weight.float(), bias).to(x.dtype)


def conv1d_in_fp32(module: Any, x: Tensor) -> Tensor:
    """The Conv1D of transformers, x W + b with W (in, out), in the same way."""
    if x.dtype != module.weight.dtype:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    weight: Tensor = module.weight.float()  # (in, out)
    sums: Tensor = x.float() @ weight + module.bias.float()  # (..., out)
    return sums.to(x.dtype)


@contextmanager
def fp32_products(model: nn.Module) -> Iterator[None]:
    """Within, plain half-precision linear layers on a CPU without such products multiply in fp32.

    A half GEMM rounds exact products of half inputs once, after an fp32 sum; so does this, so the numbers agree but
    for the order of the sum, at the speed of fp32. Quantized and otherwise special modules are left alone, and the
    model is untouched afterwards.
    """
    from transformers.pytorch_utils import Conv1D

    replacements = {nn.Linear: linear_in_fp32, Conv1D: conv1d_in_fp32}
    changed: list[nn.Module] = []
    for module in model.modules():
        product = replacements.get(type(module))
        if product is None or "forward" in vars(module):  # a hook of another library owns this module's forward
            continue
        weight = module.weight
        if isinstance(weight, Tensor) and weight.device.type == "cpu" and not native(weight.dtype):
            module.forward = types.MethodType(product, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """`torch._int_mm` through fp32, equal to the last bit: (M, K) int8 @ (K, N) int8 -> (M, N) int32.

    An fp32 sum of INT8_DEPTH products of int8 is exact, since 1023 * 128^2 < 2^24; longer rows are summed in int32.
    """
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], INT8_DEPTH):
        piece = slice(start, start + INT8_DEPTH)
        total += (a[:, piece].float() @ b[piece].float()).to(torch.int32)
    return total


@contextmanager
def quick_int8_products() -> Iterator[None]:
    """Within, a CPU without int8 dot products takes `torch._int_mm` through fp32: the same integers, some 20x sooner.

    LLM.int8 spends nearly all of an evaluation there on such processors. Timed cases never come through here except
    `latency.evaluation`, which times this very pass.
    """
    if cpu_flags() & INT8_FLAGS or not cpu_flags():
        yield
        return
    library = torch._int_mm

    def product(a: Tensor, b: Tensor) -> Tensor:
        return int8_product(a, b) if a.device.type == "cpu" else library(a, b)

    torch._int_mm = product  # type: ignore[assignment]
    try:
        yield
    finally:
        torch._int_mm = library
