"""What the rehearsal's tests share: one thread, and models and a text that are made once a session."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from harness.core.files import locked
from tests.rehearsal import card, folders
from tests.rehearsal.measuring import Plan

# of mallopt(3): what is freed stays, whatever its size, instead of being faulted in again page by page
KEEPING = {-1: 2**31 - 1, -2: 2**29, -3: 2**31 - 1}  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, bytes
TINY, WIDE = ("tiny-gpt2", "tiny-olmo"), ("gpt2", "olmo-1b", "phi-3-mini")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The headline command first: it takes half as long as all the others together, and a worker to itself."""
    items.sort(key=lambda item: "test_headline" not in item.nodeid)


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """As many as a group's process has where two tests run at once; sums differ in order by their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    card.preload()
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc
        for option, size in KEEPING.items():
            library.mallopt(option, size)
    gc.freeze()  # as preload does: a group collects garbage before every peak
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the session's workers share."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "rehearsal"


@pytest.fixture(scope="session")
def plan_of(one_thread: None, shared: Path) -> Callable[[str], Plan]:
    """The plan for a tiny model, or for one layer of a known model's true widths; both are made when first asked for.

    A plan's folder is the session's, so that a model's reference is scored once a device.
    """

    def plan(name: str) -> Plan:
        if name in TINY:
            return Plan(name, shared / "reports" / name)
        model, text = shared / "models" / name, shared / "models" / "text.txt"
        with locked(shared / f"{name}.lock"):
            if not model.is_dir():
                folders.model(name, model.with_suffix(".part"))
                model.with_suffix(".part").rename(model)
            text.write_text("".join(folders.rows()))
        return Plan(f"path:{model}", shared / "reports" / name, dataset=f"text:{text}", tokens=64)

    return plan


def vocabulary(name: str) -> int:
    """Tokens of a model that `plan_of` knows."""
    return 64 if name in TINY else folders.VOCABULARY[name]
