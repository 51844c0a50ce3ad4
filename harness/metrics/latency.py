"""Latency: how long a model takes, against the unquantized reference in the same session.

| member | one repetition | tokens |
|---|---|---|
| `latency.prefill` | one forward of the prompt that makes the KV cache, logits of the last position only | 128 |
| `latency.decode` | one forward of one token behind a cached prompt, always from the same cache length | 128 + 1 |
| `latency.forward` | one forward without a cache, logits of every position: what the reports timed | 128 |
| `latency.generate` | prefill and greedy decoding of a fixed number of tokens, past any end of text | 32 + 64 |
| `latency.evaluation` | the case's whole perplexity pass (`engine.score` over the plan), batch 1 | all |

All in inference mode, at batch 1 unless asked otherwise, on the same seeded token ids: random text, so a method whose
work depends on the activations (LLM.int8's outlier columns) meets other outliers than in prose. Where the model's
context (or its sliding window) is shorter, prompt and continuation shrink to what fits, and `detail` holds the lengths
used. `evaluation` takes one window at a time; the engine may run two beside each other where it is not timed.

*Arguments* say other lengths: `latency:prompt=512:generate=128:batch=4` times prefill (the time to the first token),
decode (the time of a token behind that prompt) and generate (the whole) with four prompts of 512 tokens at once, under
names of their own, `latency.prefill:batch=4:prompt=512`. A member can be named alone, `latency.decode:prompt=2048`.
Of generate `detail` has `tokens_per_second` and `reference_tokens_per_second`, new tokens of all rows over its p50.

*Value*: p50 of the candidate's seconds; lower is better. *Spread*: their interquartile range. *Samples*: the raw
seconds. *Protocol*: `timing` (warm-up, interleaved blocks with alternating order); the number of blocks is the
session's, at most 6 for `generate` and `evaluation`; where a block of candidate and reference takes over half a second,
so many as take no longer than the session's number would at that pace, and at least 6. *Clock*: `devices`
(CUDA events around each repetition, the device idle before it begins; `perf_counter_ns` on the CPU).

*What is judged*: `log_ratio` = ln(candidate / reference), the Hodges-Lehmann estimate over blocks with its interval
(`stats.hodges_lehmann_ratio`). Where the candidate is the reference itself, two streams of the one model are
timed against each other, and that log ratio is the session's A/A comparison. `aa_floor` (`timing.aa_floor`)
says how far the reference seems to differ from itself.

`detail`: `p90 p99 reference_p50 reference_iqr reference_samples log_ratio log_ratio_low log_ratio_high
log_ratio_usable aa_floor blocks warmup prompt_tokens new_tokens batch threads wait_policy others switches crowded`,
seconds where a time; numbers that could not be had are null. `others` is how many of the process's cores were busy for
somebody else meanwhile, `switches` how often a second it lost one; where fewer were left than it has threads the time
is `crowded`, and nothing is decided by it. On CUDA also `device_seconds` and `reference_device_seconds` (profiler;
kernels and copies of one repetition), or null with `device_seconds_error`. Of `evaluation` one window is profiled, not
the whole text; `device_tokens` says how long it is.

*Left out*: tokenising, loading, sampling, the transfer of results, everything before warm-up. On CUDA the gaps in which
the device waits for the host are in, so a small model shows its launch cost.
Equal to nobody else's number: absolute times belong to one machine. What runs is what a plain script runs: the forwards
are the model's own, as `from_pretrained` gives it, and threads wait as they do there (`--wait-policy`); `python -m
studies.performance.second_opinion` compares both. Only `evaluation` takes the engine's quicker products.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.core.contracts import Member, Metric, Subject, Window
from harness.core.records import Figure
from harness.core.specification import parse
from harness.core.stats import hodges_lehmann_ratio, summarise
from harness.inputs.models.context import context_of, text_config
from harness.metrics.measuring.timing import FEWEST_BLOCKS, WARMUP_LIMIT, Timing, Warmup, Work, aa_floor, measure

if TYPE_CHECKING:  # annotations only
    import torch
    from torch import nn

PROMPT = {"prompt": 128, "batch": 1}  # tokens, the length that the reports timed, and rows
CONTINUED = {"prompt": 32, "generate": 64, "batch": 1}
SEED = 20_251_122  # of the token ids; any number would do
LONG_WARMUP = {"latency.generate": 3, "latency.evaluation": 1}  # each repetition is many forwards of one shape
SLOW_SECONDS = 2.0  # a repetition: bitsandbytes' int8 takes 10 s a prefill on a CPU without int8 dot products
BLOCK_SECONDS = 0.5  # keeps the main job of two cores without bf16 and int8 products within minutes
UNLIMITED = 1 << 30  # a context that no length here reaches


def measure_latency(subject: Subject, member: Member) -> Figure:
    """Seconds of one member: candidate's p50 and raw samples, and in `detail` its log ratio to the reference."""
    import torch

    model = subject.model
    own = subject.case.method == subject.case.reference
    reference = model if own else subject.reference
    blocks, limit = subject.repetitions, WARMUP_LIMIT
    kind = member.name.partition(":")[0]
    if kind in LONG_WARMUP:
        blocks, limit = min(blocks, FEWEST_BLOCKS), LONG_WARMUP[kind]
    with torch.inference_mode():
        lengths, build = work(subject, member)
        candidate_work, reference_work = build(model), build(reference)
        patience: dict[str, Any] = {"limit": limit, "slow": SLOW_SECONDS, "pace": BLOCK_SECONDS}
        timing = measure(candidate_work, reference_work, subject.device.time, blocks, **patience)
        window = _longest(subject) if kind == "latency.evaluation" else ()  # a profile of a text fills memory
        if window:
            candidate_work, reference_work = (_evaluation(subject, each, window) for each in (model, reference))
        apart = _device_seconds(subject, candidate_work, reference_work)
        if apart and window:
            apart["device_tokens"] = len(window[0].ids) - 1
    summary = summarise(timing.candidate)
    detail = {"p90": summary.p90, "p99": summary.p99, **_against_reference(timing), **lengths, **apart}
    if kind == "latency.generate":
        made = lengths["new_tokens"] * lengths["batch"]
        rates = {"tokens_per_second": summary.p50, "reference_tokens_per_second": detail["reference_p50"]}
        detail |= {name: made / seconds for name, seconds in rates.items()}
    threads = torch.get_num_threads()
    detail |= {"threads": threads, "wait_policy": os.environ.get("OMP_WAIT_POLICY", "")}
    if timing.load is not None:
        detail |= {"others": timing.load.others, "switches": timing.load.switches}
        detail["crowded"] = subject.device.name == "cpu" and timing.load.crowded(threads)
    return Figure(summary.p50, "s", len(timing.candidate), summary.iqr, samples=timing.candidate, detail=detail)


def work(subject: Subject, member: Member) -> tuple[dict[str, int], Callable[[nn.Module], Work]]:
    """The lengths used, and how to make a model's work out of them."""
    given = {**member.arguments, **{key: int(value) for key, value in parse(member.name).arguments}}
    kind = parse(member.name).name.partition(".")[2]
    if kind == "evaluation":
        fed = sum(len(window.ids) - 1 for window in subject.plan.windows if window.scored)
        return {"prompt_tokens": fed, "new_tokens": 0, "batch": 1}, partial(_evaluation, subject)
    new = given.get("generate", int(kind == "decode"))
    room = _context(subject.model)
    prompt = min(given["prompt"], room - min(new, 1))
    new = min(new, room - prompt)
    ids = _token_ids(subject, given["batch"], prompt)
    works: dict[str, Callable[[nn.Module], Work]] = {
        "prefill": partial(_prefill, ids),
        "decode": partial(_decode, ids),
        "forward": partial(_forward, ids),
        "generate": partial(_generate, ids, new),
    }
    return {"prompt_tokens": prompt, "new_tokens": new, "batch": given["batch"]}, works[kind]


def _context(model: nn.Module) -> int:
    """Tokens that one cache can hold: the context, or a shorter sliding window less the slot that cropping needs."""
    context = context_of(model.config) or UNLIMITED
    window = getattr(text_config(model.config), "sliding_window", None)
    return int(min(context, window - 1) if window else context)


def _token_ids(subject: Subject, batch: int, length: int) -> torch.Tensor:
    """(batch, length) seeded ids below the vocabulary's size, on the device."""
    import torch

    count = text_config(subject.model.config).vocab_size
    ids = np.random.default_rng(SEED).integers(0, count, (batch, length))
    return torch.from_numpy(ids).to(subject.device.torch_device)  # (batch, length) int64


def _evaluation(subject: Subject, model: nn.Module, windows: Sequence[Window] = ()) -> Work:
    """The pass over the plan's windows, or over some of them."""
    from harness.metrics.measuring import engine

    windows, device = windows or subject.plan.windows, subject.device.name
    return Work(lambda: engine.score(model, windows, device=device, batch_size=1))


def _longest(subject: Subject) -> tuple[Window, ...]:
    """The longest window that scores anything; () where none does."""
    return tuple(sorted((one for one in subject.plan.windows if one.scored), key=lambda one: -len(one.ids))[:1])


def _prefill(ids: torch.Tensor, model: nn.Module) -> Work:
    from harness.metrics.measuring.decoding import last_alone

    more = {"use_cache": True, **last_alone(model)}
    return Work(lambda: model(input_ids=ids, **more))


def _forward(ids: torch.Tensor, model: nn.Module) -> Work:
    return Work(lambda: model(input_ids=ids, use_cache=False))


def _decode(ids: torch.Tensor, model: nn.Module) -> Work:
    """One token behind a prompt that is read once, and rewound to before each repetition, untimed."""
    from harness.metrics.measuring.decoding import Prompt

    prompt, token = Prompt(model, ids), ids[:, -1:]  # (B, 1)
    return Work(lambda: prompt.step(token), prompt.rewind)


def _generate(ids: torch.Tensor, new: int, model: nn.Module) -> Work:
    """Greedy decoding of exactly `new` tokens; the run gives them back."""
    from harness.metrics.measuring.decoding import greedy

    return Work(lambda: greedy(model, ids, new))


def _against_reference(timing: Timing) -> dict[str, Any]:
    """The reference's own figures, and the log ratio to it with what is needed to judge it."""
    reference = summarise(timing.reference)
    ratio = hodges_lehmann_ratio(np.array(timing.candidate), np.array(timing.reference))
    return {
        "reference_p50": reference.p50,
        "reference_iqr": reference.iqr,
        "reference_samples": list(timing.reference),
        "log_ratio": _finite(ratio.value),
        "log_ratio_low": _finite(ratio.low),
        "log_ratio_high": _finite(ratio.high),
        "log_ratio_usable": ratio.usable,
        "aa_floor": aa_floor(timing.reference),
        "blocks": len(timing.reference),
        "warmup": {
            "candidate": _warmup(timing.warmup_candidate),
            "reference": _warmup(timing.warmup_reference),
        },
    }


def _warmup(warmup: Warmup) -> dict[str, Any]:
    return {"repetitions": warmup.repetitions, "settled": warmup.settled}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _device_seconds(subject: Subject, candidate: Work, reference: Work) -> dict[str, Any]:
    """The accelerator's own seconds where there are such; a profiler that sees nothing is no error, but a note."""
    from harness.metrics.measuring.devices import NoDeviceTime

    try:
        ours = subject.device.device_seconds(candidate)
        if ours is None:
            return {}
        return {"device_seconds": ours, "reference_device_seconds": subject.device.device_seconds(reference)}
    except NoDeviceTime as error:
        return {"device_seconds": None, "reference_device_seconds": None, "device_seconds_error": str(error)}


METRIC = Metric(
    family="latency",
    members=(
        Member("latency.prefill", "s", "lower", timed=True, textual=False, arguments=PROMPT),
        Member("latency.decode", "s", "lower", timed=True, textual=False, arguments=PROMPT),
        Member("latency.forward", "s", "lower", timed=True, textual=False, core=False, arguments=PROMPT),
        Member("latency.generate", "s", "lower", timed=True, textual=False, core=False, arguments=CONTINUED),
        Member("latency.evaluation", "s", "lower", timed=True, protocols=("chunk",), core=False),
    ),
    measure=measure_latency,
    work=work,
)
