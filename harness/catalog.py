"""Lists a folder of methods or metrics: the file's existence is the registration.

A file that fails to import, or holds no METHOD or METRIC, stops the run with its path. Installed packages add
more through the entry points `harness.methods` and `harness.metrics`. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from harness.contracts import Method, Metric
from harness.errors import HarnessError
from harness.files import sha256_file

GROUPS = ("harness.methods", "harness.metrics")
T = TypeVar("T", Method, Metric)


def _attribute(module: ModuleType, name: str, kind: type[T]) -> T:
    value = getattr(module, name, None)
    if not isinstance(value, kind):
        raise HarnessError(f"{module.__file__} holds no {name} of type {kind.__name__}")
    return value


def _folder(package: str, attribute: str, kind: type[T]) -> dict[str, T]:
    home = importlib.import_module(package)
    found = {}
    for info in sorted(pkgutil.iter_modules(home.__path__), key=lambda info: info.name):
        if info.name.startswith("_"):
            continue
        try:
            module = importlib.import_module(f"{package}.{info.name}")
        except Exception as error:
            raise HarnessError(f"{home.__path__[0]}/{info.name}.py fails to import: {error!r}") from error
        found[info.name] = _attribute(module, attribute, kind)
    return found


def _installed(group: str, kind: type[T]) -> dict[str, T]:
    found = {}
    for point in entry_points(group=group):
        try:
            value = point.load()
        except Exception as error:
            raise HarnessError(f"entry point {group}: {point.name} = {point.value} fails: {error!r}") from error
        if not isinstance(value, kind):
            raise HarnessError(f"entry point {group}: {point.name} = {point.value} is no {kind.__name__}")
        found[point.name] = value
    return found


def installed_sources() -> dict[str, str]:
    """Source files of every installed package that brings methods or metrics, by path: sha256."""
    found = {}
    for point in sorted({point.module.partition(".")[0] for group in GROUPS for point in entry_points(group=group)}):
        spec = importlib.util.find_spec(point)
        homes = list(spec.submodule_search_locations or ()) if spec else []
        single = [Path(spec.origin)] if spec and spec.origin and not homes else []
        for path in [*single, *(path for home in homes for path in sorted(Path(home).rglob("*.py")))]:
            found[str(path)] = sha256_file(path)
    return found


@functools.cache
def methods() -> dict[str, Method]:
    """Every method by name: the folder's in order of their core list, then installed ones."""
    found = {method.name: method for method in _folder("harness.methods", "METHOD", Method).values()}
    for name, method in _installed("harness.methods", Method).items():
        if name in found:
            raise HarnessError(f"entry point harness.methods: '{name}' is already a method of the harness")
        found[name] = method
    return found


@functools.cache
def metrics() -> dict[str, Metric]:
    """Every metric family by name."""
    found = {metric.family: metric for metric in _folder("harness.metrics", "METRIC", Metric).values()}
    for name, metric in _installed("harness.metrics", Metric).items():
        if name in found:
            raise HarnessError(f"entry point harness.metrics: '{name}' is already a metric of the harness")
        found[name] = metric
    return found
