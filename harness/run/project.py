"""Takes in what a user's project brings: methods, metrics, models and datasets. No torch.

Files with a METHOD or METRIC join the catalogue of this process; declared models and datasets are looked up where they
are used. A name that is taken is refused here, before anything runs, with where both come from.
"""

from __future__ import annotations

from harness.core import catalog
from harness.core.errors import HarnessError
from harness.core.options import Declared
from harness.inputs.models import names
from harness.inputs.texts import corpora


def open_to(declared: Declared) -> None:
    """Take in what a project declares; HarnessError where a name is taken."""
    catalog.declare(declared)
    where = declared.root / "pyproject.toml"
    known = (
        ("models", declared.models, {*names.KNOWN, *names.SOURCES}),
        ("datasets", declared.datasets, corpora.DATASETS),
    )
    for kind, declarations, taken in known:
        for name in declarations:
            if name in taken:
                raise HarnessError(f"{where}: [tool.harness.{kind}] declares '{name}', a known name: choose another")
    for kind, declarations, installed in (
        ("models", declared.models, names.installed() if declared.models else {}),
        ("datasets", declared.datasets, corpora.installed() if declared.datasets else {}),
    ):
        for name in declarations:
            if name in installed:
                raise HarnessError(
                    f"{where}: [tool.harness.{kind}] declares '{name}', which an installed package adds too "
                    f"(entry point harness.{kind}): choose another"
                )
