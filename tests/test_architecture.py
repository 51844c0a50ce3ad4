"""The rooms of the harness, walked with `ast`: which there are, which way imports run, and what stays light.

A room is a folder at the package's root. It imports from rooms of a lower floor, and from itself; imports inside
functions and under TYPE_CHECKING count as much as those at the top, except where lightness is asked for.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import harness

HOME = Path(harness.__file__).parent
FLOORS = (
    "core",
    "inputs results",
    "methods judge",
    "metrics",
    "published",
    "report",
    "run",
    "plugin",
    "cases __main__",
)  # rooms of one floor do not know each other
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
ROOMS = FLOOR.keys() - {"__main__"}
SHIMS = {"contracts", "weightmethod", "records"}  # names that other people's files import, for one release
MODULES_A_FOLDER = 20
HEAVY = {"torch", "transformers", "bitsandbytes", "accelerate", "datasets", "matplotlib"}
LIGHT_ROOMS = {"core", "results", "judge", "report", "plugin", "published", "methods", "metrics"}
WORKSHOPS = ("harness.methods.quantizing", "harness.metrics.measuring")
LIGHT_MODULES = {
    *"harness.run.plan harness.run.session harness.run.local harness.run.shards harness.run.merge".split(),
    *"harness.__main__ harness.run.prediction harness.run.forecast harness.run.ray.ray_runner".split(),
    *"harness.run.upgrade.driver harness.run.upgrade.interleaved".split(),
    *"harness.run.rebaseline harness.run.fingerprints".split(),
    *"harness.inputs.models.names harness.inputs.models.folder".split(),
    *"harness.inputs.hub harness.inputs.texts.corpora harness.inputs.texts.protocols".split(),
    *"harness.methods.quantizing.arguments harness.methods.quantizing.calibration".split(),
    *"harness.methods.quantizing.weight_method".split(),
}
PYTEST_FACE = {"plugin", "cases"}


@dataclass(frozen=True)
class Import:
    """One import of one module: what, from where, and whether it happens when the module is imported."""

    target: str  # dotted, 'harness.core.records' or 'torch.nn'
    line: int
    at_import: bool
    typing: bool  # under TYPE_CHECKING


def module_name(path: Path) -> str:
    parts = path.relative_to(HOME.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(HOME.rglob("*.py"))}
MODULES = sorted(FILES.keys() - {"harness"} - {f"harness.{name}" for name in SHIMS})


def room(module: str) -> str:
    """'report' for 'harness.report.plots'."""
    return module.split(".")[1]


def targets(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules that a statement names: `from harness.core import x` is the module x where there is one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.module, "imports are absolute"
    named = [f"{node.module}.{alias.name}" for alias in node.names]
    found = [name for name in named if name in FILES]
    return found + ([node.module] if len(found) < len(named) else [])


def walk(node: ast.AST, at_import: bool = True, typing: bool = False) -> Iterator[Import]:
    """Every import in a piece of source."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from (Import(target, node.lineno, at_import and not typing, typing) for target in targets(node))
        return
    checking = isinstance(node, ast.If) and ast.unparse(node.test).removeprefix("typing.") == "TYPE_CHECKING"
    inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        under = typing or (checking and isinstance(node, ast.If) and child in node.body)
        yield from walk(child, at_import and not inside, under)


@functools.cache
def imports(module: str) -> tuple[Import, ...]:
    return tuple(walk(ast.parse(FILES[module].read_text())))


def own(module: str) -> list[Import]:
    """Imports of the harness's own modules; of the bare package only its public names can be had."""
    return [one for one in imports(module) if one.target.startswith("harness.")]


def loaded_by(module: str) -> dict[str, list[str]]:
    """Everything that importing a module imports in turn: target -> the chain that leads there."""
    chains: dict[str, list[str]] = {}
    queue = [(module, [module])]
    while queue:
        at, chain = queue.pop()
        parents = [at.rsplit(".", cut)[0] for cut in range(1, at.count("."))]  # a package runs before its modules
        for target in [one.target for one in imports(at) if one.at_import] + parents:
            if target not in chains:
                chains[target] = [*chain, target]
                if target in FILES:
                    queue.append((target, chains[target]))
    return chains


def test_eleven_rooms_and_nothing_beside_them() -> None:
    entries = {path.stem if path.suffix == ".py" else path.name for path in HOME.iterdir()} - {"__pycache__"}
    assert entries - {"__init__", "__main__", "py.typed"} - SHIMS == ROOMS
    assert len(ROOMS) == 11


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_a_room_says_what_it_is_for(name: str) -> None:
    assert ast.get_docstring(ast.parse(FILES[f"harness.{name}"].read_text()))


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    floor, here = FLOOR[room(module)], room(module)
    up = [
        f"line {one.line}: {one.target}"
        for one in own(module)
        if room(one.target) != here and FLOOR.get(room(one.target), -1) >= floor
    ]
    assert not up, f"{module} (floor {floor}) imports from above or beside: {up}"


def test_no_cycles() -> None:
    """Between modules as they are run; between rooms there can be none."""
    graph = {module: {one.target for one in own(module) if not one.typing} - {module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("folder", ["methods", "metrics"])
def test_methods_and_metrics_are_reached_through_the_catalogue_alone(folder: str) -> None:
    reached = [
        f"{module}, line {one.line}: {one.target}"
        for module in MODULES
        for one in own(module)
        if one.target.startswith(f"harness.{folder}.") and one.target.count(".") == 2 and one.target not in WORKSHOPS
    ]
    assert not reached


def test_only_the_face_imports_pytest() -> None:
    others = {
        module
        for module in MODULES
        for one in imports(module)
        if one.target.partition(".")[0] in {"pytest", "_pytest"} and room(module) not in PYTEST_FACE
    }
    assert not others


LIGHT = [
    module
    for module in MODULES
    if module in LIGHT_MODULES or (room(module) in LIGHT_ROOMS and not module.startswith(WORKSHOPS))
]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy_in_turn(module: str) -> None:
    heavy = [" -> ".join(chain) for target, chain in loaded_by(module).items() if target.partition(".")[0] in HEAVY]
    assert not heavy


PROBE = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    found = {"torch", "transformers", "bitsandbytes"} & sys.modules.keys()
    if found:
        sys.exit(f"{name} loads {sorted(found)}")
from harness.core import catalog
assert catalog.methods() and catalog.metrics()
found = {"torch", "transformers", "bitsandbytes"} & sys.modules.keys()
sys.exit(f"listing methods and metrics loads {sorted(found)}" if found else 0)
"""


def test_light_modules_load_no_torch_when_run() -> None:
    """The walk above reads only what the harness says; what other packages import shows when it is run."""
    done = subprocess.run([sys.executable, "-c", PROBE, *LIGHT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_folder_is_a_corridor() -> None:
    folders = {path.parent for path in FILES.values()}
    crowded = {str(folder): len(list(folder.glob("*.py"))) - 1 for folder in folders}  # less its __init__
    assert {name: count for name, count in crowded.items() if count > MODULES_A_FOLDER} == {}


def test_no_grab_bag() -> None:
    assert not {part for module in MODULES for part in module.split(".")} & {"utils", "util", "common", "helpers"}


def test_the_walk_sees_what_it_should() -> None:
    source = """
import torch.nn
from harness.core import records
from harness import __version__
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import transformers
else:
    import numpy
class A:
    import scipy
    def f(self):
        from harness.core.errors import HarnessError
try:
    import json
except ImportError:
    pass
"""
    found = {(one.target, one.at_import, one.typing) for one in walk(ast.parse(source))}
    assert found == {
        ("torch.nn", True, False),
        ("harness.core.records", True, False),
        ("harness", True, False),
        ("typing", True, False),
        ("transformers", False, True),
        ("numpy", True, False),
        ("scipy", True, False),
        ("harness.core.errors", False, False),
        ("json", True, False),
    }


def test_a_chain_is_followed_through_packages() -> None:
    module = "harness.metrics.measuring.devices"
    assert loaded_by(module)["torch"] == [module, "torch"]


def test_no_two_modules_of_one_name() -> None:
    """A room or a module is named once, so that its name alone says where a line lies."""
    homes: dict[str, list[str]] = {}
    for module in MODULES:
        homes.setdefault(module.rpartition(".")[2], []).append(module)
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


def test_no_two_classes_of_one_name() -> None:
    """Each name says one thing in the whole package, so that a reader who meets it knows which."""
    homes: dict[str, list[str]] = {}
    for module in MODULES:
        for node in ast.walk(ast.parse(FILES[module].read_text())):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(module)
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}
