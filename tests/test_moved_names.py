"""Names that other people's files import go on for one release, and say where they went."""

import importlib
import sys

import pytest

MOVED = {
    "harness.contracts": ("harness.core.contracts", "Method"),
    "harness.weightmethod": ("harness.methods.quantizing.weight_method", "weight_method"),
    "harness.records": ("harness.core.records", "Row"),
}


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_new_things_own(old: str) -> None:
    new, name = MOVED[old]
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is {new} now"):
        module = importlib.import_module(old)
    assert getattr(module, name) is getattr(importlib.import_module(new), name)
