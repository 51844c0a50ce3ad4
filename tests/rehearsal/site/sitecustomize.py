"""Gives the groups of a real pytest session the pretended card. With the tests' root as ROOT:

    environment["PYTHONPATH"] = f"{ROOT}/tests/rehearsal/site"  # this folder; Python imports this file when it starts
    subprocess.run([sys.executable, "-m", "pytest", "--device", "cuda", ...], env=environment)

The session's own processes ask the driver for cards: give them the stub driver as well
(`tests.rehearsal.driver.variables`).
Nothing is imported or changed here but `group.serve`, once somebody imports it: in the process of a group that
runs on a card it is called within `tests.rehearsal.card.pretended`.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
GROUP = "harness.run.group"


def on_the_pretended_card(serve: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """`serve` as it is for a job on the CPU, within the pretence for one on a card."""

    @functools.wraps(serve)
    def within(job: Any, connection: Any) -> None:
        if job.device != "cuda":
            return serve(job, connection)
        sys.path.insert(0, str(ROOT))  # a project may have tests of its own
        from tests.rehearsal.card import pretended

        sys.path.remove(str(ROOT))
        with pretended():
            return serve(job, connection)

    return within


class Loader(importlib.abc.Loader):
    """Loads `group` as its own loader does, then wraps its `serve`."""

    def __init__(self, own: importlib.abc.Loader) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.own.exec_module(module)
        module.serve = on_the_pretended_card(module.serve)  # type: ignore[attr-defined]


class Finder(importlib.abc.MetaPathFinder):
    """Finds `group`, where the other finders find it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != GROUP:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(spec.loader)
        return spec


sys.meta_path.insert(0, Finder())
