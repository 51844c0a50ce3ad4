"""The plan: which cases a session means to measure, from its project, its options and a look at the devices. No torch.

Computed alike in every process, so that a case that never ran can be shown as missing. What no case could run under
(a name that is taken, an engine that is not there, cards that nobody has) is refused here, before anything runs.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

from harness.core import catalog, gpus
from harness.core.contracts import Member, Method
from harness.core.environment import usable_cores
from harness.core.errors import BadSpecification, HarnessError, UnknownName
from harness.core.options import Declared, Options
from harness.core.records import Case
from harness.core.specification import Specification, parse, parse_method
from harness.inputs.models import names as models
from harness.inputs.texts import corpora, protocols
from harness.methods.quantizing import arguments, calibration
from harness.metrics.measuring import checks
from harness.run.shards import partition

CORE = (
    "fp32 bf16 fp16 absmax-int8 absmax-int8-tensor zeropoint-int8 linear-int4 linear-int4-affine nf4 fp4 "
    "bnb-int8 bnb-fp4 bnb-nf4 bnb-nf4-dq"
).split()  # the order of tables; core methods of other packages follow by name
ALL_INSTALLED = Specification("all-installed")
MEMORY_FIRST = {"memory": 0, "perplexity": 1, "divergence": 2, "latency": 4}  # peaks before anything else is loaded


def open_to(declared: Declared) -> None:
    """Take in what a user's project brings; HarnessError where a name is taken.

    Files with a METHOD or METRIC join the catalogue of this process; declared models and datasets are looked up where
    they are used.
    """
    catalog.declare(declared)
    for kind, declarations, known, installed in (
        ("models", declared.models, {*models.KNOWN, *models.SOURCES}, models.installed),
        ("datasets", declared.datasets, corpora.DATASETS, corpora.installed),
    ):
        added = installed() if declarations else {}
        for name in declarations:
            where = f"{declared.root / 'pyproject.toml'}: [tool.harness.{kind}] declares '{name}'"
            if name in known:
                raise HarnessError(f"{where}, a known name: choose another")
            if name in added:
                raise HarnessError(
                    f"{where}, which an installed package adds too (entry point harness.{kind}): choose another"
                )


def check_cards(cases: Sequence[Case], options: Options, usable: bool, workers: int) -> None:
    """HarnessError where the selected cases ask for more cards than there are; without a case on one nothing is asked.

    Args:
        cases: those selected. Where all need a card and none can be had, each of them would only be missing.
        options: of the session; with `allow_missing` that is wanted.
        usable: whether a card can be had, as `cuda` says.
        workers: of pytest-xdist, each of which takes a card; 0 where this process measures.
    """
    needy = [case for case in cases if case.device == "cuda"]
    if needy and len(needy) == len(cases) and not usable and not options.allow_missing:
        elsewhere = f", and no node of the Ray cluster at {options.ray_address} has one" if options.ray_address else ""
        fix = f"use --device cpu, or --allow-missing to report the {len(needy)} cases as missing"
        raise HarnessError(f"no CUDA device: {gpus.trouble()}{elsewhere}; {fix}")
    if needy and workers and (cards := gpus.cuda_devices()):
        gpus.refuse_crowd(workers, cards)


def threads() -> int:
    """One thread a core that this process may use: the same whatever -n says."""
    return len(usable_cores())


def plan(options: Options, cuda_visible: bool) -> tuple[Case, ...]:
    """Every case the options ask for, grouped by device, model and method, the reference first."""
    options = replace(options, reference=reference_of(options))
    methods = chosen_methods(options)
    members = chosen_members(options.metrics)
    for model in options.models:
        models.declared_source(model, options.declared)
    if options.reference.model:
        models.declared_source(parse(options.reference.model), options.declared)
    for dataset in options.datasets:
        corpora.resolve(dataset, options.declared)
    planned: dict[Case, None] = {}  # a set that keeps its order
    for device in devices(options, cuda_visible):
        for specification, method in methods:
            calibration.refuse_evaluation_text(
                arguments.resolve(specification, method, device), options.datasets, str(specification)
            )
        planned |= dict.fromkeys(cases(options, methods, members, device))
    return tuple(planned)


def cases(
    options: Options, methods: Sequence[tuple[Specification, Method]], members: Sequence[Member], device: str
) -> Iterator[Case]:
    """The cases of the options' models and texts under some methods, on one device."""
    texts = [(dataset, protocols.parse(protocol)) for dataset in options.datasets for protocol in options.protocols]
    for model, (specification, method), member in itertools.product(options.models, methods, members):
        own = specification == options.reference
        if member.needs_file and method.file_bytes is None:
            continue
        # the reference differs from itself by nothing; a stopped text has no perplexity
        if (member.paired and own) or (options.stop_early and member.needs_whole_text and not own):
            continue
        rest = (member.name, device, str(options.reference))
        for dataset, protocol in texts if member.textual else ():
            if not member.protocols or protocol.name in member.protocols:
                yield Case(str(model), str(specification), str(dataset), str(protocol), *rest)
        if not member.textual:
            yield Case(str(model), str(specification), "", "", *rest)


def whole(options: Options, cuda_visible: bool) -> tuple[Case, ...]:
    """`plan`, and before it the invariants, which are planned apart and cost little, where the metrics name them."""
    rest = tuple(name for name in options.metrics if name != "invariant")
    behaviour = invariant_plan(options, cuda_visible) if rest != options.metrics else ()
    return (*behaviour, *(plan(replace(options, metrics=rest), cuda_visible) if rest or not behaviour else ()))


def invariant_plan(options: Options, cuda_visible: bool) -> tuple[Case, ...]:
    """Every invariant of the methods asked for, on a layer and on the tiny models; a process's cases together."""
    own = replace(reference_of(options), model="")  # checked on layers and models of their own
    options = replace(options, reference=own)
    methods = chosen_methods(options)
    planned: list[Case] = []
    for device in devices(options, cuda_visible):
        for model, (specification, method) in itertools.product((checks.LAYER, *checks.MODELS), methods):
            arguments.resolve(specification, method, device)
            names = [checks.metric(check) for check in checks.CHECKS if check.runs(model, method)]
            planned += [Case(model, str(specification), "", "", name, device, str(options.reference)) for name in names]
    return tuple(planned)


def devices(options: Options, cuda_visible: bool) -> tuple[str, ...]:
    """The devices planned for: asked for by name, named in the mark expression, else the visible one."""
    if options.device != "auto":
        return (options.device,)
    if re.search(r"\b(gpu|cpu)\b", options.mark_expression):
        return ("cpu", "cuda")  # the expression itself then deselects what it does not mean
    return ("cuda",) if cuda_visible else ("cpu",)


def reference_of(options: Options) -> Specification:
    """The reference asked for: a method, or that of another model; a known or declared model's name is its fp32."""
    asked = options.reference
    if asked.model or asked.name in catalog.methods():
        return asked
    try:
        models.declared_source(asked, options.declared)
    except UnknownName:
        return asked  # taken for a method, whose names are listed
    return Specification("fp32", model=str(asked))


def models_of(cases: Iterable[Case]) -> list[str]:
    """Every model that the cases read: their own, and those of references."""
    named = ((case.model, parse_method(case.reference).model) for case in cases if case.model != checks.LAYER)
    return list(dict.fromkeys(name for pair in named for name in pair if name))


def chosen_methods(options: Options) -> list[tuple[Specification, Method]]:
    """The reference, then the methods asked for; unknown names list the known ones."""
    known = catalog.methods()
    core = ordered(name for name, method in known.items() if method.core)
    usual = [options.reference.name] if options.reference.model else core  # as it is, against what it was made from
    asked = list(options.methods) or [Specification(name) for name in usual]
    if ALL_INSTALLED in asked:
        asked = [item for item in asked if item != ALL_INSTALLED]
        asked += [Specification(name) for name in ordered(known) if not missing_packages(known[name])]
    unique = dict.fromkeys((options.reference, *asked))
    return [(specification, method_of(specification, known)) for specification in unique]


def method_of(specification: Specification, known: Mapping[str, Method]) -> Method:
    """The catalogue's method of that name."""
    if specification.name not in known:
        raise UnknownName("method", specification.name, (*known, str(ALL_INSTALLED)))
    return known[specification.name]


def ordered(names: Iterable[str]) -> list[str]:
    """Core methods in table order, then the others by name."""
    return sorted(names, key=lambda name: (CORE.index(name) if name in CORE else len(CORE), name))


def packages(method: Method, values: Mapping[str, Any]) -> dict[str, str]:
    """Distributions that the method needs with these values of its arguments, and their versions: '' where absent."""
    chosen = ((parameter, values.get(key, parameter.default)) for key, parameter in method.parameters.items())
    names = [*method.requires, *(one.requires[value] for one, value in chosen if value in one.requires)]
    versions = dict.fromkeys(names, "")
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def missing_packages(method: Method, values: Mapping[str, Any] = MappingProxyType({})) -> list[str]:
    """Those of `packages` that are not installed."""
    return [name for name, version in packages(method, values).items() if not version]


def chosen_members(asked: Iterable[str]) -> list[Member]:
    """The members named, a family standing for its core members and 'all' for every one; peaks first, timing last."""
    families = catalog.metrics()
    members = {member.name: member for metric in families.values() for member in metric.members}
    apart = {member.name for metric in families.values() if metric.apart for member in metric.members}
    chosen: dict[str, Member] = {}
    for name in asked:
        if name == "all":
            chosen |= {name: member for name, member in members.items() if name not in apart}
        elif name in families:
            chosen |= {member.name: member for member in families[name].members if member.core}
        elif name in members:
            chosen[name] = members[name]
        elif ":" in name:
            chosen |= {member.name: member for member in catalog.members_given(name)}
        else:
            raise UnknownName("metric", name, {*families, *members, "all"})
    if not chosen:
        raise BadSpecification("--metrics names nothing to measure")
    order = list(members)

    def place(member: Member) -> tuple[int, int]:
        name = member.name.partition(":")[0]  # behind it: arguments
        return MEMORY_FIRST.get(name.partition(".")[0], 3), order.index(name)

    return sorted(chosen.values(), key=place)


def mine(whole: Sequence[Case], options: Options) -> Sequence[Case]:
    """The cases of this shard; all of them where there is none."""
    shard = options.shard
    return whole if shard is None else partition(whole, shard.count)[shard.index - 1]
