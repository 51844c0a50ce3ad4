"""The contract of every method that the user's own files or installed packages add, and of those named in --methods.

Seven checks on two small random models (`promises`); they need no download and take seconds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness.cases import promises
from harness.cases.promises import ARCHITECTURES, CHECKS, Candidate
from harness.core import catalog
from harness.core.contracts import Checkpoint, Method
from harness.plugin import state_of
from harness.run import plan


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a method, architecture and check."""
    if "contract_method" not in metafunc.fixturenames:
        return
    named = {specification.name for specification in state_of(metafunc.config).options.methods}
    tested = [
        item.value for name, item in plan.ordered_items(catalog.listed_methods()) if name in named or not item.own
    ]
    why = "no method of another package or file is here, and --methods names none"
    none = [pytest.param(None, id="all", marks=pytest.mark.skip(reason=why))]
    metafunc.parametrize("contract_method", [pytest.param(item, id=item.name) for item in tested] or none)
    metafunc.parametrize("contract_architecture", ARCHITECTURES)
    metafunc.parametrize("contract_check", [pytest.param(check, id=check.__name__) for check in CHECKS])


@pytest.fixture(scope="session")
def contract_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """The two models."""
    folder = tmp_path_factory.mktemp("contract")
    return {name: promises.checkpoint(name, folder / name) for name in ARCHITECTURES}


@pytest.mark.contract
def test_contract(
    contract_method: Method,
    contract_architecture: str,
    contract_check: Callable[[Candidate], None],
    contract_checkpoints: dict[str, Checkpoint],
) -> None:
    """One promise of a method, kept on one model."""
    if missing := plan.missing_packages(contract_method):
        pytest.skip(f"missing: pip install {' '.join(missing)}")
    if contract_check is promises.save_and_load and not contract_method.reloads:
        pytest.skip("it declares that its state_dict cannot be loaded again")
    contract_check(Candidate(contract_method, contract_checkpoints[contract_architecture]))
