"""Lists methods and metrics: of the harness's own folders, of files that a project declares, of installed packages.

In the folders a file's existence is the registration: METHOD is one method, METHODS are a library's. A project adds
files of its own under `[tool.harness]` (`methods = ["quant/mine.py"]`, `metrics = [...]`), a package through the entry
points `harness.methods` and `harness.metrics`. Whatever fails to import, breaks a contract or takes a name that is
taken stops the run in one line that says where it comes from. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

from harness.core.contracts import Member, Method, Metric, faults
from harness.core.errors import HarnessError, UnknownName
from harness.core.files import sha256_file
from harness.core.options import Declared, positive
from harness.core.records import Case
from harness.core.specification import Specification, parse
from harness.core.values import digest

GROUPS = ("harness.methods", "harness.metrics")
T = TypeVar("T", Method, Metric)
V = TypeVar("V")
_declared: dict[str, tuple[Path, ...]] = {"METHOD": (), "METRIC": ()}


@dataclass(frozen=True)
class Listed(Generic[T]):
    """One catalogued thing and where it comes from, in words."""

    value: T
    origin: str
    own: bool = False  # of the harness itself


def declare(declared: Declared) -> None:
    """Take the files that a project declares into the catalogue of this process, in place of those before."""
    before = dict(_declared)
    _declared["METHOD"] = tuple(declared.root / path for path in declared.methods)
    _declared["METRIC"] = tuple(declared.root / path for path in declared.metrics)
    if _declared != before:
        listed_methods.cache_clear()
        metrics.cache_clear()
        member.cache_clear()


def outside_code() -> str:
    """A digest of the declared files, '' where there are none (`installed_sources` has the packages)."""
    files = {str(path): sha256_file(path) for paths in _declared.values() for path in paths if path.is_file()}
    return digest(files) if files else ""


def _held(module: ModuleType, kind: type[T]) -> tuple[T, ...]:
    """What a file registers: METHOD, one of the kind, or else METHODS, several; METRIC and METRICS alike."""
    name = kind.__name__.upper()
    values = (getattr(module, name),) if hasattr(module, name) else getattr(module, f"{name}S", ())
    if not isinstance(values, tuple | list) or not values or not all(isinstance(value, kind) for value in values):
        raise HarnessError(f"{module.__file__} holds no {name} of type {kind.__name__}")
    return tuple(values)


def _folder(package: str, kind: type[T]) -> Iterator[Listed[T]]:
    home = importlib.import_module(package)
    for info in sorted(pkgutil.iter_modules(home.__path__), key=lambda info: info.name):
        if info.ispkg:
            continue  # a workshop
        origin = f"{home.__path__[0]}/{info.name}.py"
        try:
            module = importlib.import_module(f"{package}.{info.name}")
        except Exception as error:
            raise HarnessError(f"{origin} fails to import: {error!r}") from error
        yield from (Listed(value, origin, own=True) for value in _held(module, kind))


def _files(kind: type[T]) -> Iterator[Listed[T]]:
    for path in _declared[kind.__name__.upper()]:
        where = f"{path} (declared under [tool.harness])"
        if not path.is_file():
            raise HarnessError(f"{where} is not there")
        name = f"harness_declared_{digest(str(path))[:12]}"  # two files of one name stay apart
        specification = importlib.util.spec_from_file_location(name, path)
        if specification is None or specification.loader is None:
            raise HarnessError(f"{where} is no Python file")
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module  # dataclasses and pickles look their module up
        try:
            specification.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise HarnessError(f"{where} fails to import: {error!r}") from error
        yield from (Listed(value, str(path)) for value in _held(module, kind))


def entry_values(group: str, kind: type[V], what: str) -> Iterator[tuple[str, V, str]]:
    """Every entry point of a group: its name, its value, and where it comes from in words.

    HarnessError where one fails to load, or is not of the kind (`what` in words).
    """
    for point in entry_points(group=group):
        where = f"entry point {group}: {point.name} = {point.value}"
        try:
            value = point.load()
        except Exception as error:
            raise HarnessError(f"{where} fails: {error!r}") from error
        if not isinstance(value, kind):
            raise HarnessError(f"{where} is no {what}")
        yield point.name, value, where


def _listed(kind: type[T], name_of: str) -> dict[str, Listed[T]]:
    """The folder's, then declared files', then installed ones, by name; each held to its contract, no name twice."""
    names: dict[str, Listed[T]] = {}
    what = kind.__name__.lower()
    packages = entry_values(f"harness.{what}s", kind, kind.__name__)
    installed = (Listed(value, where) for _, value, where in packages)
    for item in itertools.chain(_folder(f"harness.{what}s", kind), _files(kind), installed):
        for fault in faults(item.value):
            raise HarnessError(f"{item.origin} breaks its contract: {fault}")
        name = getattr(item.value, name_of)
        if name in names:
            raise HarnessError(f"{item.origin}: '{name}' is already a {what} of the harness ({names[name].origin})")
        names[name] = item
    return names


def installed_sources() -> dict[str, str]:
    """Source files of every installed package that brings methods or metrics, by path: sha256."""
    sources = {}
    for package in sorted({point.module.partition(".")[0] for group in GROUPS for point in entry_points(group=group)}):
        spec = importlib.util.find_spec(package)
        homes = list(spec.submodule_search_locations or ()) if spec else []
        single = [Path(spec.origin)] if spec and spec.origin and not homes else []
        for path in [*single, *(path for home in homes for path in sorted(Path(home).rglob("*.py")))]:
            sources[str(path)] = sha256_file(path)
    return sources


@functools.cache
def listed_methods() -> dict[str, Listed[Method]]:
    """Every method by name, with where it comes from."""
    return _listed(Method, "name")


def methods() -> dict[str, Method]:
    """Every method by name."""
    return {name: item.value for name, item in listed_methods().items()}


@functools.cache
def metrics() -> Mapping[str, Metric]:
    """Every metric family by name."""
    return {name: item.value for name, item in _listed(Metric, "family").items()}


@functools.cache
def member(name: str) -> Member | None:
    """The metric of a full name, if there is one; for a family of the harness's own, its file alone is imported."""
    family = name.partition(".")[0]
    own = {info.name for info in pkgutil.iter_modules([str(Path(__file__).parents[1] / "metrics")])}
    asked = [importlib.import_module(f"harness.metrics.{family}").METRIC] if family in own else metrics().values()
    base, _, arguments = name.partition(":")
    found = {one.name: one for metric in asked for one in metric.members}.get(base)
    return replace(found, name=name) if found and arguments else found


def members_given(text: str) -> list[Member]:
    """The members that a name with arguments means, each named with those of them that it takes.

    Of a family, 'latency:prompt=512:generate=128:batch=4': its core members, and others that alone take one of the
    arguments. A value that is a member's own default is left out of its name.

    Raises:
        UnknownName: a family, member or argument that is not there.
        BadSpecification: a value that is no whole number above zero.
    """
    asked = parse(text)
    families = metrics()
    every = {one.name: one for metric in families.values() for one in metric.members}
    if asked.name not in families and asked.name not in every:
        raise UnknownName("metric", asked.name, {*families, *every})
    listed = families[asked.name].members if asked.name in families else (every[asked.name],)
    given = {key: positive(value) for key, value in asked.arguments}
    for key in (*asked.words, *given):
        if not any(key in one.arguments for one in listed) or key in asked.words:
            raise UnknownName(f"argument of {asked.name}", key, {f"{key}=N" for one in listed for key in one.arguments})
    main = [one for one in listed if (one.core or len(listed) == 1) and given.keys() & one.arguments.keys()]
    taken = {key for one in main for key in one.arguments}
    return [
        replace(
            one, name=str(Specification(one.name, (), tuple(sorted((key, str(value)) for key, value in own.items()))))
        )
        for one in listed
        if one in main or given.keys() & one.arguments.keys() - taken
        for own in [{key: value for key, value in given.items() if one.arguments.get(key, value) != value}]
    ]


def member_of(case: Case) -> Member:
    """The member that a case measures; UnknownName where no metric brings it."""
    measured = member(case.metric)
    if measured is None:
        raise UnknownName("metric", case.metric, metrics())
    return measured


def code_version() -> str:
    """sha256 over the source of the harness and of packages that bring methods or metrics: a change measures anew."""
    home = Path(__file__).parents[1]
    own = {str(path.relative_to(home)): path.read_text(encoding="utf-8") for path in sorted(home.rglob("*.py"))}
    return digest([own, installed_sources()])
