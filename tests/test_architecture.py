"""The import table of the harness, walked with `ast`: directions, cycles, what stays light, and lengths.

Every module stands in LEVELS; a module imports only from its own level or below. Imports inside functions count as
much as those at the top, except where lightness is asked for; imports under TYPE_CHECKING count nowhere.
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
LEVELS = (
    "plain text errors jsonvalues rowlines records specifications contracts options sharding files",
    "catalog methods metrics arguments nllfiles weightmethod codes fused fused_loops rounding rounding_loops quantized "
    "scopes census memory card_kernels fake_card bnb bnb_tensors cpu_products engine products divergence sequential "
    "devices timing models "
    "cards checkpoints gguf_weights gguf_file gguf_families "
    "gguf_blocks gguf_tokenizers gguf_write admission calibration gptq pieces "
    "libraries prequantized int4_store streaming "
    "hubmodels weightfiles tiny synthetic corpora layouts "
    "hubtext hubanswers architectures protocols "
    "windows stats environment probe messages recorded facts wording invariants inputs strangers "
    "cachefolders",
    "door planning preloaded child group layergroup turns needs known_faults upgrade runner placing cluster session "
    "report judge question reference record compare two_reports error_rate contract baselines bounds published fits "
    "card_memory "
    "rebaselining "
    "merging",
    "plugin collector publisher commands",
    "cases __main__",
)  # a package stands for all of its modules
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
HEAVY = {"torch", "transformers", "bitsandbytes", "accelerate", "datasets", "matplotlib"}
TORCH_FREE = frozenset(  # and every package's modules: importing these, and all that they import, loads nothing heavy
    "errors jsonvalues rowlines records specifications contracts options files catalog admission calibration door "
    "methods metrics arguments protocols corpora models stats environment probe architectures planning runner session "
    "report judge question reference record compare two_reports baselines bounds published plugin recorded facts "
    "wording error_rate rebaselining sharding merging known_faults upgrade placing cluster inputs plain text "
    "strangers cachefolders hubanswers".split()
)
APART = {"judge", "baselines", "report"}  # none imports another
PYTEST_FACE = {"plugin", "collector", "publisher", "cases"}
MODULE_LINES, FUNCTION_LINES = 300, 40


@dataclass(frozen=True)
class Import:
    """One import of one module: what, from where, and whether it happens when the module is imported."""

    target: str  # dotted, 'harness.records' or 'torch.nn'
    line: int
    at_import: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(HOME.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(HOME.rglob("*.py"))}
MODULES = sorted(FILES.keys() - {"harness"})


def room(module: str) -> str:
    """The table's name for a module: 'report' for 'harness.report.plots'."""
    return module.split(".")[1]


def targets(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules that a statement names: `from harness import x` is the module x where there is one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.module, "imports are absolute"
    named = [f"{node.module}.{alias.name}" for alias in node.names]
    found = [name for name in named if name in FILES]
    return found + ([node.module] if len(found) < len(named) else [])


def walk(node: ast.AST, at_import: bool = True) -> Iterator[Import]:
    """Every import in a piece of source, those under TYPE_CHECKING left out."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from (Import(target, node.lineno, at_import) for target in targets(node))
        return
    children: list[ast.AST] = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and ast.unparse(node.test).removeprefix("typing.") == "TYPE_CHECKING":
        children = list(node.orelse)
    inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in children:
        yield from walk(child, at_import and not inside)


@functools.cache
def imports(module: str) -> tuple[Import, ...]:
    return tuple(walk(ast.parse(FILES[module].read_text())))


def own(module: str) -> list[Import]:
    """Imports of the harness's own modules; of the bare package only its version can be had, which costs nothing."""
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


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_level(module: str) -> None:
    assert room(module) in LEVEL, f"{module} has no level: add '{room(module)}' to LEVELS in {Path(__file__).name}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    level = LEVEL.get(room(module), 0)  # one without a level fails above, by name
    up = [f"line {one.line}: {one.target}" for one in own(module) if LEVEL.get(room(one.target), 0) > level]
    assert not up, f"{module} (level {level}) imports from above: {up}"


def test_no_cycles() -> None:
    graph = {module: {one.target for one in own(module)} - {module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in APART])
def test_judge_baselines_and_report_stand_apart(module: str) -> None:
    others = [one.target for one in own(module) if room(one.target) in APART - {room(module)}]
    assert not others


@pytest.mark.parametrize("folder", ["methods", "metrics"])
def test_methods_and_metrics_are_reached_through_the_catalogue_alone(folder: str) -> None:
    reached = [
        f"{module}, line {one.line}: {one.target}"
        for module in MODULES
        for one in own(module)
        if one.target.startswith(f"harness.{folder}")
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


def test_studies_and_tests_stay_outside() -> None:
    others = {
        f"{module}, line {one.line}: {one.target}"
        for module in MODULES
        for one in imports(module)
        if one.target.partition(".")[0] in {"studies", "tests"}
    }
    assert not others


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in TORCH_FREE])
def test_light_modules_import_nothing_heavy_in_turn(module: str) -> None:
    heavy = [" -> ".join(chain) for target, chain in loaded_by(module).items() if target.partition(".")[0] in HEAVY]
    assert not heavy


LIGHT = [module for module in MODULES if room(module) in TORCH_FREE]
PROBE = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    found = {"torch", "transformers", "bitsandbytes"} & sys.modules.keys()
    if found:
        sys.exit(f"{name} loads {sorted(found)}")
from harness import catalog
assert catalog.methods() and catalog.metrics()
found = {"torch", "transformers", "bitsandbytes"} & sys.modules.keys()
sys.exit(f"listing methods and metrics loads {sorted(found)}" if found else 0)
"""


def test_light_modules_load_no_torch_when_run() -> None:
    """The walk above reads only what the harness says; what other packages import shows when it is run."""
    done = subprocess.run([sys.executable, "-c", PROBE, *LIGHT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["harness", *MODULES])
def test_modules_are_short(module: str) -> None:
    lines = len(FILES[module].read_text().splitlines())
    assert lines <= MODULE_LINES, f"{module} has {lines} lines: split it by what changes together"


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement behind the docstring to the last, functions inside a function included."""
    body = function.body[1:] if ast.get_docstring(function) and function.body[1:] else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module: str) -> None:
    functions = (
        node
        for node in ast.walk(ast.parse(FILES[module].read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    long = [f"{node.name} ({code_lines(node)} lines)" for node in functions if code_lines(node) > FUNCTION_LINES]
    assert not long


def test_no_grab_bag() -> None:
    assert not {part for module in MODULES for part in module.split(".")} & {"utils", "util", "common", "helpers"}


def test_the_walk_sees_what_it_should() -> None:
    source = """
import torch.nn
from harness import records, __version__
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import transformers
else:
    import numpy
class A:
    import scipy
    def f(self):
        from harness.errors import HarnessError
try:
    import json
except ImportError:
    pass
"""
    found = {(one.target, one.at_import) for one in walk(ast.parse(source))}
    assert found == {
        ("torch.nn", True),
        ("harness.records", True),
        ("harness", True),
        ("typing", True),
        ("numpy", True),
        ("scipy", True),
        ("harness.errors", False),
        ("json", True),
    }


def test_a_chain_is_followed_through_packages() -> None:
    assert loaded_by("harness.devices")["torch"] == ["harness.devices", "torch"]
    assert " ".join(loaded_by("harness.bnb")["harness.records"]) == "harness.bnb harness.contracts harness.records"
