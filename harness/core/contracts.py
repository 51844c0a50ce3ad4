"""What a method and a metric are. Declarations only: listing them imports no torch.

A file in `methods/` holds `METHOD`, a file in `metrics/` holds `METRIC`; the file's existence is the registration.
Their functions import torch inside themselves, so that `pytest --collect-only` stays light. `faults` says whether one
from elsewhere keeps what is declared; what only running shows is held by `harness.cases.test_contracts`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from harness.core.records import Case, Figure
from harness.core.specification import NAME

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

    from harness.core.options import Declared

DTYPES: Mapping[str, str] = MappingProxyType({"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"})  # by torch
DEFAULT_DTYPES = {"cpu": "fp32", "cuda": "fp16"}  # by device: fp16 is slow or missing in CPU kernels
AS_MODEL = "dtype"  # a compute dtype that follows the model's


@dataclass(frozen=True)
class Parameter:
    """One argument of a method: its type, default and meaning; `requires` names a distribution that a value needs."""

    kind: type[int] | type[float] | type[str]
    default: int | float | str
    help: str
    choices: tuple[int | float | str, ...] = ()
    requires: Mapping[int | float | str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scope:
    """Which weights a method of ours quantizes.

    part: 'linear' every matrix of the decoder's layers (packed experts and routers too, but no lm_head), 'attention'
    or 'mlp' half of them, 'all' every weight, embeddings, head and norms too. `layers` is an inclusive range of decoder
    layers, `names` a glob over the names of modules and of packed parameters; both narrow the part.
    """

    part: str = "linear"
    layers: tuple[int, int] | None = None
    names: str = ""


@dataclass(frozen=True)
class Arguments:
    """A method's arguments after the defaults: nothing is left to a library's own default."""

    dtype: str  # of what is not quantized, and of the activations
    scope: Scope | None = None  # None: the method selects by itself (libraries, references)
    values: Mapping[str, int | float | str] = field(default_factory=dict)
    declared: Declared | None = None  # what the session's project declares, for a method that reads a text


@dataclass(frozen=True)
class Checkpoint:
    """A plain model folder (config.json, *.safetensors, tokenizer.json) and where it came from."""

    specification: str
    directory: Path
    revision: str  # commit of a Hub model, else sha256 over the weights files
    note: str = ""  # what a reader must know, e.g. that the weights were stored as Q4_1
    grid: str = ""  # quantization grid that the weights already lie on, e.g. 'affine4:32'
    trust_remote_code: bool = False
    allow_pickle: bool = False
    identity: Mapping[str, str] = field(default_factory=dict)  # `core.identity`: what the computation is made of


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized weight as it lies in a model, for the census and the error figures."""

    name: str  # of the module; of another parameter than its `weight` (packed experts) that parameter's
    kind: str  # class of the module it replaced: Linear, Conv1D, Embedding, ...
    elements: int  # of the weight it replaced
    storage: int  # bytes of codes, scales, zero points, code tables
    dequantize: Callable[[], torch.Tensor]  # the weight it stands for, in the original module's layout


@dataclass(frozen=True)
class Method:
    """A quantization method (or, with `bits` 32 or 16 and no quantized weights, a reference).

    load(checkpoint, arguments, device) -> model in eval mode, on `device` ("cpu" or "cuda"), quantized.
    sketch(model, arguments) rewrites an unquantized model on the meta device so that it holds exactly the tensors
    that `load` would hold before its first forward: shapes and dtypes, no weights.
    quantized(model) yields the quantized weights of a loaded (or sketched) model.
    targets(model, arguments) names the modules that must be quantized; fewer is an error.
    """

    name: str
    summary: str  # one line
    bits: float  # of a code, scales not counted
    load: Callable[[Checkpoint, Arguments, str], nn.Module]
    sketch: Callable[[nn.Module, Arguments], None]
    quantized: Callable[[nn.Module], Iterator[QuantizedWeight]]
    targets: Callable[[nn.Module, Arguments], list[str]]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    scoped: bool = False  # takes a scope
    dtype: str = ""  # fixed dtype of a reference; "" lets the user choose
    requires: tuple[str, ...] = ()  # distributions
    uses: tuple[str, ...] = ()  # distributions that make it faster where they are there; its rows say which were
    batch_invariant: bool = True  # False: activations quantized with statistics across rows; measured at batch 1
    grid: str = ""  # 'affine4:32' where the codes can represent such a grid exactly
    core: bool = True  # planned by default
    calibrated: bool = False  # looks at a text: `load` leaves on the model, as `calibration`, what a row records of it
    reloads: bool = True  # False: what a state_dict holds of it cannot be loaded by load_state_dict (bitsandbytes)
    concurrent: bool = False  # True: a forward changes nothing of the model, so that two may run beside each other
    file_bytes: Callable[[nn.Module], int] | None = None  # of the file that a loaded model was read from, where one is
    notes: Mapping[str, str] = field(default_factory=dict)  # by device: what a reader of its rows there must know


@dataclass(frozen=True)
class Member:
    """One number of a metric family."""

    name: str  # full name, 'memory.storage'
    unit: str
    better: str  # 'lower', 'higher' or 'neither'
    exact: bool = False  # held bit for bit, and carried over to every environment
    timed: bool = False  # a latency: exclusive, judged as a ratio
    textual: bool = True  # needs a dataset and a protocol
    paired: bool = False  # needs the reference's NLL on the same tokens
    protocols: tuple[str, ...] = ()  # protocol names under which it exists; () means all
    needs_whole_text: bool = False  # not planned with --stop-early, but for the reference
    needs_file: bool = False  # planned for methods with `file_bytes` alone
    core: bool = True  # planned when the family is named; False: only when the member itself is, or 'all'
    arguments: Mapping[str, int] = field(default_factory=dict)  # that may stand behind its name, with their defaults


@dataclass(frozen=True)
class Metric:
    """A family of numbers; the module's docstring is their specification."""

    family: str
    members: tuple[Member, ...]
    measure: Callable[[Subject, Member], Figure]
    work: Callable[[Subject, Member], tuple[dict[str, int], Callable[[nn.Module], Any]]] | None = None  # of timed ones:
    # the token counts, and a model -> one repetition (`timing.Work`), for whoever times models in turn
    apart: bool = False  # planned by its own name alone, never by 'all'


@dataclass(frozen=True)
class Window:
    """One forward pass: token ids fed in, and how many of the last positions' successors are scored.

    ids: (L,) int64. The logits at positions L-1-k .. L-2 predict ids[L-k:], k = scored <= L-1.
    """

    ids: NDArray[np.int64]
    scored: int


@dataclass(frozen=True)
class TokenPlan:
    """One text under one tokenizer and protocol: what will be fed and scored, known before a model is loaded."""

    protocol: str  # short name with the W used, 'chunk:512'
    protocol_id: str  # everything that fixes the number, in words
    token_hash: str  # sha256 of the planned token ids, little-endian int32
    tokens: int  # planned tokens
    windows: tuple[Window, ...]
    aggregate: str  # 'token' exp(sum/count) or 'window' exp(mean of window means)
    normalisers: Mapping[str, int] = field(default_factory=dict)  # 'word', 'byte' counts of the text scored


class Subject(Protocol):
    """What a metric measures: one loaded model in its group's process, and its reference."""

    case: Case
    arguments: Arguments
    method: Method
    checkpoint: Checkpoint
    device: Any  # devices.Cpu or devices.Cuda
    predicted: dict[str, int]  # memory.parameters, memory.footprint, memory.storage in bytes
    before: dict[str, int]  # the same measured before the first forward, and the peak of loading by the device's names
    repetitions: int  # timed repetitions of candidate and reference each

    @property
    def plan(self) -> TokenPlan:
        """The token plan of the case in hand."""

    @property
    def model(self) -> nn.Module:
        """The model under the method, eval mode, no grad."""

    @property
    def reference(self) -> nn.Module:
        """The unquantized model, loaded on first use; shares nothing mutable with `model`."""

    def nll(self) -> NDArray[np.float32]:
        """(scored tokens,) nats of the case's plan under `model`, in window order; computed once a plan."""

    def reference_nll(self) -> NDArray[np.float32]:
        """The same under the reference, computed once a session and shared through a file."""

    def release_reference(self) -> None:
        """Drop the reference model, so that a peak counts the candidate alone."""


BETTER = ("lower", "higher", "neither")


def faults(value: Method | Metric) -> Iterator[str]:
    """What is wrong with a declaration, in words; nothing where all is well."""
    yield from _method(value) if isinstance(value, Method) else _metric(value)


def _method(method: Method) -> Iterator[str]:
    if not (isinstance(method.name, str) and NAME.fullmatch(method.name)):
        yield f"its name {method.name!r} is no name that a specification can hold (letters, digits, '.', '_', '-')"
    if not method.bits > 0:
        yield f"its bits are {method.bits!r}, not a number above 0"
    for part in ("load", "sketch", "quantized", "targets"):
        if not callable(getattr(method, part)):
            yield f"its {part} is {getattr(method, part)!r}, which cannot be called"
    if method.dtype not in ("", *DTYPES):
        yield f"its dtype is {method.dtype!r}, not one of {', '.join(DTYPES)} or ''"
    for key, parameter in method.parameters.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", key) or key in ("dtype", "layers", "names", "batch"):
            yield f"its argument '{key}' is named as no argument can be"
        if not isinstance(parameter.default, parameter.kind):
            yield f"its argument '{key}' is of type {parameter.kind.__name__}, its default {parameter.default!r} is not"
        elif parameter.choices and parameter.default not in parameter.choices:
            yield f"its argument '{key}' has the default {parameter.default!r}, which is none of its choices"


def _metric(metric: Metric) -> Iterator[str]:
    if not (isinstance(metric.family, str) and NAME.fullmatch(metric.family)):
        yield f"its family {metric.family!r} is no name"
    if not metric.members:
        yield "it has no members"
    if not callable(metric.measure):
        yield f"its measure is {metric.measure!r}, which cannot be called"
    names = [member.name for member in metric.members]
    for member in metric.members:
        if member.name != metric.family and not member.name.startswith(f"{metric.family}."):
            yield f"its member '{member.name}' does not start with '{metric.family}.'"
        if names.count(member.name) > 1:
            yield f"its member '{member.name}' is there twice"
        if member.better not in BETTER:
            yield f"its member '{member.name}' is better {member.better!r}, not one of {', '.join(BETTER)}"
