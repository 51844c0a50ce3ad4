"""Memory of a model, in bytes.

| member | formula | exact |
|---|---|---|
| `memory.parameters` | sum of numel * element size over parameters, a tied tensor once | yes |
| `memory.footprint` | parameters + buffers: what transformers' `get_memory_footprint()` returns | yes |
| `memory.storage` | parameters, buffers and quantization state (absmax, nested absmax, code tables, offsets, SCB, \
scales, zero points), each storage once | yes |
| `memory.storage_after` | `memory.storage` after a forward | no |
| `memory.load_peak` | highest memory of the process from before the first weight is read to the loaded model | no |
| `memory.run_peak` | highest memory during one forward over 512 tokens (fewer if the context is shorter) | no |
| `memory.file` | size of the file that holds the model whole, tokenizer and metadata too (methods `gguf-*` only) | no |

Direction: lower is better. Unit: bytes (reports convert to MiB = 2^20 bytes).

*Exact* ones are read right after loading, before any forward, and each is also predicted from the configuration,
method and dtype alone. `detail` holds `predicted` and `predicted_equal`: measured and predicted must be the same byte
for byte, and where they are not, the figure is out of bound whatever its value. Hold on every device and processor.

*storage_after* is no fact of the model alone: on processors with AVX512-BF16 bitsandbytes (0.49 and later) repacks
4-bit weights at their first forward, halves their scales to bf16 and undoes double quantization. Compare it only at
equal instruction set and equal bitsandbytes version. `detail` holds the storage `before`.

*Peaks* count everything that the process holds, the model included. On CUDA they are of torch's allocator, which does
not see the driver's context and the workspaces of libraries: the value is `allocated`, what tensors filled, and
`detail` has `requested` beside it, the same before the pool rounds sizes, which `harness memory --device cuda`
predicts, and `reserved`, what the pool took from the device. The pool follows what was held before: at loading
transformers allocates the whole model once to warm it up, and a quantized one keeps that room. On a CPU they are
the peak resident set of the group's own process (so the interpreter and torch's code are in it, some hundred MiB, and
reading a memory-mapped file counts); `detail["note"]` tells where the mark could not be reset: the peak is then that of
the process since its start. The reference is dropped before `run_peak`. No key-value cache is kept.

Left out: swap, file caches, other processes, gradients. Disk size is not memory; it is a member of methods whose
product is a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.core.contracts import Member, Metric, Subject
from harness.core.records import Figure
from harness.inputs.models.context import context_of, text_config

PROMPT = 8  # tokens of the forward before storage_after: any forward repacks, a short one is cheap
WINDOW = 512  # tokens of the forward whose peak is read: the default protocol's window
# as devices name them; the first that a device has is the value
PEAKS = ("resident", "allocated", "requested", "reserved")


def measure(subject: Subject, member: Member) -> Figure:
    """One member of a loaded model; `Figure.detail` as the module's docstring says."""
    model: Any = subject.model  # loaded here at the latest, which fills `before` and `predicted`
    if member.exact:
        value, predicted = subject.before[member.name], subject.predicted.get(member.name)
        if predicted is None:  # a live module: no configuration and method say what it should be
            return Figure(value, "B")
        return Figure(value, "B", detail={"predicted": predicted, "predicted_equal": value == predicted})
    if member.needs_file:
        assert subject.method.file_bytes is not None  # else not planned
        return Figure(subject.method.file_bytes(model), "B")
    if member.name == "memory.load_peak":
        return _peak(subject.before, subject.device)
    if member.name == "memory.run_peak":
        length = min(WINDOW, context_of(model.config) or WINDOW)
        subject.release_reference()
        subject.device.reset_peak()
        _forward(subject, model, length)
        figure = _peak(subject.device.peak(), subject.device)
        figure.detail["tokens"] = length
        return figure
    from harness.inputs.models import sizes

    _forward(subject, model, PROMPT)
    before = subject.before["memory.storage"]
    return Figure(sizes.storage_bytes(model), "B", detail={"before": before, "tokens": PROMPT})


def _peak(peak: Mapping[str, int], device: Any) -> Figure:
    """A phase's peak: of tensors, never of the pool that they lie in, which stands in the detail."""
    peaks = {name: peak[name] for name in PEAKS if name in peak}
    note = {"note": device.peak_note} if device.peak_note else {}
    return Figure(next(iter(peaks.values())), "B", detail={**peaks, **note})


def _forward(subject: Subject, model: Any, length: int) -> None:
    """One forward without a cache over arbitrary valid ids, waited for."""
    import torch

    count = text_config(model.config).vocab_size
    ids = torch.arange(length, device=subject.device.torch_device) % count  # (length,)
    with torch.inference_mode():
        model(ids[None], use_cache=False)  # (1, length)
    subject.device.synchronize()


def _member(name: str, *, exact: bool = False, core: bool = True) -> Member:
    return Member(f"memory.{name}", "B", "lower", exact=exact, textual=False, core=core)


METRIC = Metric(
    "memory",
    (
        _member("parameters", exact=True),
        _member("footprint", exact=True),
        _member("storage", exact=True),
        _member("storage_after", core=False),
        _member("load_peak", core=False),
        _member("run_peak", core=False),
        Member("memory.file", "B", "lower", textual=False, needs_file=True),
    ),
    measure,
)
