"""Live modules: measured in the process that holds them, by the same group, judge and rows as a model on disk.

A live module is a method whose loading is done: it stands in a catalogue of its own beside its reference. What it
quantizes is found by laying it beside the reference, module by module, and no configuration predicts its bytes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.core.contracts import Arguments, Checkpoint, Method, QuantizedWeight
from harness.core.errors import BadSpecification, HarnessError
from harness.core.identity import identity_digest
from harness.core.options import Options
from harness.core.records import Case, Row
from harness.core.specification import NAME, Specification, parse
from harness.core.values import parse_json, sha256_text
from harness.inputs.models import identity_facts, sizes
from harness.inputs.texts import corpora
from harness.methods.quantizing import bnb
from harness.methods.quantizing.stored import WEIGHT, StoredWeight, held, owners, place, plain_class
from harness.run import plan as planning
from harness.run.group import Group, answered, failure
from harness.run.local import Process, Runner
from harness.run.messages import Job, Reply, Stop
from harness.run.session import Session

NAMED, REFERENCE = "live", "reference"  # what the rows call a module that was given without a name, and its reference
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
OWN_PROCESS = {"memory.load_peak", "memory.run_peak"}  # what a process holds that does other things too says nothing


@dataclass(frozen=True)
class Live:
    """The caller's modules by name, the reference among them, with what all of them share."""

    modules: Mapping[str, nn.Module]
    reference: str | None  # its name; None where each module is its own
    tokenizer: Any
    device: str

    @property
    def original(self) -> nn.Module:
        """The unquantized module, or else the first."""
        return self.modules[self.reference] if self.reference else next(iter(self.modules.values()))

    @property
    def model(self) -> str:
        """What the rows call the model: its class."""
        return type(self.original).__name__.strip("_") or "module"


@contextlib.contextmanager
def opened(models: Any, tokenizer: Any, reference: Any, options: Options) -> Iterator[tuple[Session, tuple[Case, ...]]]:
    """A session that measures live modules in this process, and its cases; the modules evaluate meanwhile.

    Raises:
        HarnessError: no tokenizer, a name that is none, something that is no module, or modules on several devices.
    """
    live = _read(models, tokenizer, reference)
    if options.device not in ("auto", live.device):
        raise HarnessError(f"device={options.device} and the module is on {live.device}: move it, or leave device out")
    options = replace(
        options,
        models=(parse(live.model),),
        reference=Specification(live.reference or NAMED),
        shard=None,
        engine="local",
        resume=False,
    )
    members = planning.chosen_members(options.metrics)
    if any(member.name.startswith("invariant.") for member in members):
        raise HarnessError("invariants are of named methods: leave them out beside a live module")
    cases: tuple[Case, ...] = ()
    for name, method in methods_of(live).items():
        named = replace(options, reference=Specification(live.reference or name))  # without one each is its own
        cases += tuple(planning.cases(named, [(Specification(name), method)], members, live.device))
    with evaluating(live), bnb.quiet():
        yield Session(options, torch.get_num_threads(), cases, runner=functools.partial(LiveRunner, live)), cases


def _read(models: Any, tokenizer: Any, reference: Any) -> Live:
    """The caller's modules, held to what measuring needs."""
    modules = dict(models) if isinstance(models, Mapping) else {NAMED: models}
    if reference is not None:
        if REFERENCE in modules:
            raise BadSpecification(f"'{REFERENCE}' is what the rows call the reference: give the module another name")
        modules = {REFERENCE: reference, **modules}
    for name, module in modules.items():
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise BadSpecification(f"{name!r} is no name for a module: letters, digits, '.', '_' and '-'")
        if not isinstance(module, nn.Module):
            whose = "reference=" if name == REFERENCE and reference is not None else f"'{name}'"
            raise HarnessError(f"{whose} is a {type(module).__name__}: beside live modules all must be live")
    if not modules:
        raise HarnessError("models={} names nothing to measure")
    if tokenizer is None:
        raise HarnessError("a live module needs its tokenizer: measure(module, tokenizer, ...)")
    return Live(modules, None if reference is None else REFERENCE, tokenizer, _device(modules))


def _device(modules: Mapping[str, nn.Module]) -> str:
    """'cpu' or 'cuda', where every tensor of the modules lies."""
    every = itertools.chain.from_iterable((*one.parameters(), *one.buffers()) for one in modules.values())
    found = {tensor.device for tensor in every}
    if len(found) != 1:
        places = ", ".join(sorted(map(str, found))) or "no device"
        raise HarnessError(f"the modules lie on {places}: move all of them to one, module.to('cuda')")
    (device,) = found
    if device.type not in ("cpu", "cuda"):
        raise HarnessError(f"the modules lie on {device}: move them to the processor or to a CUDA card")
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        raise HarnessError(f"the modules lie on {device}: call torch.cuda.set_device({device.index}) first")
    return device.type


def methods_of(live: Live) -> dict[str, Method]:
    """A method for each module, by name: what it quantizes is what differs from the reference's module."""
    return {
        name: Method(
            name=name,
            summary="a live module",
            bits=32,
            load=_not_loaded,
            sketch=_not_loaded,
            quantized=functools.partial(changed_weights, live.original),
            targets=functools.partial(_changed_names, module),
            dtype=next((DTYPES[tensor.dtype] for tensor in sizes.held(module) if tensor.dtype in DTYPES), "fp32"),
        )
        for name, module in live.modules.items()
    }


def _changed_names(module: nn.Module, original: nn.Module, arguments: Arguments) -> list[str]:
    return [weight.name for weight in changed_weights(original, module)]


def _not_loaded(*arguments: Any) -> Any:
    raise AssertionError("a live module is there already")


def changed_weights(original: nn.Module, module: nn.Module) -> Iterator[QuantizedWeight]:
    """The weights that a module stores otherwise than the original: under another class, or in no floating tensor.

    The other must have every module of the original under its name. Storage is whatever hangs on the module in the
    weight's place, but its bias and weights that are as they were; what several share is counted with the first.
    """
    changed: list[tuple[str, nn.Module]] = []
    left, seen = set[int](), set[int]()
    for name in owners(original):
        old, key = place(original, name)
        new, now = (module.get_submodule(name), WEIGHT) if key == WEIGHT else place(module, name)
        weight = new._parameters.get(now)
        plain = weight is not None and weight.is_floating_point() and not hasattr(weight, "__tensor_flatten__")
        if plain_class(old) is plain_class(new) and plain:
            left.add(id(weight))
            continue
        store = dict(held(new)).get(now)
        changed.append((name, store if isinstance(store, StoredWeight) else new))
    for name, holder in changed:
        old, key = place(original, name)
        weights = dict(held(old))
        beside = {"bias", *(one for one in old._parameters if one not in weights)}
        others = left | {id(tensor) for path, tensor in holder.named_parameters() if path.rpartition(".")[2] in beside}
        storages = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
            for tensor in sizes.held(holder)
            if id(tensor) not in others
        }
        fresh = sum(size for storage, size in storages.items() if storage not in seen)
        seen.update(storages)
        was = weights[key]
        elements = math.prod(was.layout if isinstance(was, StoredWeight) else was.shape)
        yield QuantizedWeight(name, plain_class(old).__name__, elements, fresh, _not_loaded)


def homes(original: nn.Module) -> set[str]:
    """The modules that hold weights, by name."""
    placed = ((name, place(original, name)[1]) for name in owners(original))
    return {name if key == WEIGHT else name.rpartition(".")[0] for name, key in placed}


def facts_of(live: Live, weights: str) -> dict[str, str]:
    """The identity of the unquantized module: its tensors, configuration and tokenizer, and code of its own."""
    kind = type(live.original)
    own = not kind.__module__.startswith("transformers.models.")
    stated: dict[str, Any] = getattr(getattr(live.original, "config", None), "to_dict", dict)()
    facts = {"weights": weights, **identity_facts.config_facts(stated, own_code=own)}
    if own:
        try:
            facts[f"code.{kind.__qualname__}"] = sha256_text(inspect.getsource(kind))
        except (OSError, TypeError):  # typed at a prompt: there is no source to be had
            facts[f"code.{kind.__qualname__}"] = kind.__module__
    backend = getattr(live.tokenizer, "backend_tokenizer", None)
    return facts | (identity_facts.tokenizer_parts(parse_json(backend.to_str())) if backend is not None else {})


@contextlib.contextmanager
def evaluating(live: Live) -> Iterator[None]:
    """The modules in eval mode, and the switches of a card's precision put back at the end, which opening it sets."""
    training = [(part, part.training) for module in live.modules.values() for part in module.modules()]
    product, precision = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    switches: list[tuple[Any, str]] = [
        (product, f"allow_{half}_reduced_precision_reduction") for half in ("fp16", "bf16")
    ]
    switches.append((torch.backends.cudnn, "allow_tf32"))
    before = [(owner, name, getattr(owner, name)) for owner, name in switches]
    for module in live.modules.values():
        module.eval()
    try:
        yield
    finally:
        for part, was in training:
            part.training = was
        torch.set_float32_matmul_precision(precision)
        for owner, name, value in before:
            setattr(owner, name, value)


class LiveRunner(Runner):
    """Measures in this process, one group a module."""

    def __init__(self, live: Live, options: Options, *, threads: int, lock: Path) -> None:
        super().__init__(options, threads=threads, lock=lock)
        self.live = live
        digest = hashlib.sha256()  # over the bytes of every tensor, in the order of the walk
        for tensor in sizes.held(live.original):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self.revision = digest.hexdigest()
        self.identity = facts_of(live, self.revision)
        self.groups: dict[str, LiveGroup] = {}

    def prepare(self, cases: Sequence[Case], say: Callable[[str], None]) -> Mapping[str, str]:
        """Token plans, so that a text that cannot be read or scored is said before anything is measured."""
        for dataset in dict.fromkeys(case.dataset for case in cases if case.dataset):
            with self.costing(case for case in cases if case.dataset == dataset):
                corpora.check(parse(dataset), self.options.declared)
        left = self.fit(cases)
        for text in dict.fromkeys((case.dataset, case.protocol) for case in left if case.dataset):
            with self.costing(case for case in left if (case.dataset, case.protocol) == text):
                self._group_of(left[0]).plan_of(*text)
        self.fit(cases)
        self.identities = {identity_digest(self.identity): self.identity}
        return {}

    def _process_for(self, case: Case) -> InThisProcess:
        return InThisProcess(self._group_of(case))

    def _group_of(self, case: Case) -> LiveGroup:
        if case.method not in self.groups:
            asked = (case.model, case.method, case.device, case.reference)
            job = Job(self.options, *asked, self.threads, self._logs / "unused")
            self.groups[case.method] = LiveGroup(job, self.live, self.revision, self.identity)
        return self.groups[case.method]


class InThisProcess(Process):
    """Stands where a group's process and its pipe do, and answers at once."""

    def __init__(self, group: LiveGroup) -> None:
        self.group, self.predicted, self.ended = group, {}, False

    def ask(self, verb: str, argument: Any, say: Callable[[str], None] = lambda line: None) -> Reply:
        """What the group answers; its error as one line or a traceback."""
        try:
            return answered(self.group, verb, argument)
        except Exception as error:
            return failure(error)

    def close(self) -> None:
        """Nothing to end."""


class LiveGroup(Group):
    """A caller's module as the subject of metrics."""

    def __init__(self, job: Job, live: Live, revision: str, identity: Mapping[str, str]) -> None:
        note = "a live module, measured in its caller's process"
        checkpoint = Checkpoint(job.model, Path(), revision, note, identity=identity)
        super().__init__(job, None, methods_of(live), checkpoint)
        self.live = live

    @property
    def tokenizer(self) -> Any:
        """The caller's."""
        return self.live.tokenizer

    @property
    def config(self) -> Any:
        """The module's own; None where it has none."""
        return getattr(self.live.original, "config", None)

    @functools.cached_property
    def world(self) -> tuple[str, ...]:
        """What the reference's losses depend on in this process."""
        return self.environment.id, str(self.job.threads)

    @property
    def model(self) -> nn.Module:
        """The caller's module."""
        module = self.live.modules[self.job.method]
        if self._model is None:
            self.examine(module, dict(self.live.original.named_modules()))
            self._model = module
        return module

    @property
    def reference(self) -> nn.Module:
        """The caller's unquantized module; the module itself where there is none."""
        return self.live.modules[self.live.reference or self.job.method]

    def release_reference(self) -> None:
        """The reference stays: it is the caller's."""

    def counted(self, model: nn.Module, original: Mapping[str, nn.Module]) -> dict[str, Any]:
        """The census; {} where no reference, or one of other modules, says how many weights there are."""
        names = {name for name, _ in model.named_modules()}
        if self.live.reference is None or not homes(original[""]) <= names:
            return {}
        return super().counted(model, original)

    def key(self, case: Case, stop: Stop | None = None) -> str:
        """None: the caller can change a module between two calls."""
        return ""

    def measure(self, case: Case, stop: Stop | None = None) -> Row:
        """One row; HarnessError for what only a process of its own can tell."""
        if case.metric in OWN_PROCESS:
            raise HarnessError(
                f"{case.metric} needs a process of its own: save the module and measure models='path:DIR'"
            )
        row = super().measure(case, stop)
        return replace(row, detail={**row.detail, "live": True})
