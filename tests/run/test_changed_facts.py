"""Who fails for changed exact facts follows from the plan, whichever process measures which case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.core.catalog import member_of
from harness.core.environment import Environment
from harness.core.options import Declared, Options
from harness.core.records import Case, Row, Verdict
from harness.judge.baselines import exact_document, exact_facts, exact_path, provenance, write_exact
from harness.run.session import Session

WORLD = Environment(torch="2.13.0")
PLAN = [Case("m", "fp32", "", "", f"memory.{name}", "cpu") for name in ("parameters", "footprint", "storage")]


def row(case: Case, buffers: int) -> Row:
    size = 1000 if case.metric == "memory.parameters" else 1000 + buffers
    detail = {"predicted": size, "predicted_equal": True}
    census = {"bytes_by_dtype": {"float32": 1000 + buffers}}
    return Row.of(case, value=float(size), unit="B", detail=detail, census=census, environment=WORLD.id)


class Measured:
    """A runner to whom a model gained a mask buffer; some of its cases have no figure."""

    def __init__(self, gone: Sequence[Case]) -> None:
        self.gone, self.threads, self.environments = gone, 1, {WORLD.id: WORLD.to_dict()}

    def measure(self, case: Case, *known: Any) -> tuple[Row, str]:
        return (Row.of(case, verdict=Verdict.MISSING, reason="gone") if case in self.gone else row(case, 131072)), ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    document = None
    for case in PLAN:
        document = exact_document(document, exact_facts(row(case, 0), member_of(case)), provenance(WORLD.to_dict()))
    assert document
    write_exact(exact_path(tmp_path / "baselines", PLAN[0]), document)
    return tmp_path


def worse(
    folder: Path, cases: Sequence[Case], meant: Sequence[Case], gone: Sequence[Case] = (), shard: Sequence[Case] = ()
) -> list[str]:
    """The metrics that fail in a process that measures some of the cases that are meant, or of its shard's."""
    options = Options(Declared(folder), report_dir=folder / "report", baselines=folder / "baselines")
    session = Session(options, 1, meant, runner=lambda *_, **__: Measured(gone))  # type: ignore[arg-type]
    session.meant = tuple(shard) or session.meant
    rows = [session.check(case)[0] for case in cases]
    return [one.metric for one in rows if Verdict.WORSE in (one.verdict, one.verdict_baseline)]


def test_the_first_of_what_is_meant_fails_wherever_it_is_measured(folder: Path) -> None:
    assert worse(folder, PLAN, PLAN) == ["memory.parameters"]
    assert worse(folder, PLAN[1:], PLAN) == []  # another worker has it
    assert worse(folder, PLAN[1:], PLAN[1:]) == ["memory.footprint"]  # -k or --lf left it out
    assert worse(folder, PLAN[1:], PLAN, shard=PLAN[1:]) == []  # another shard has it
    assert worse(folder, PLAN[:1], PLAN, shard=PLAN[:1]) == ["memory.parameters"]


def test_one_without_a_figure_leaves_it_to_the_next(folder: Path) -> None:
    assert worse(folder, PLAN, PLAN, PLAN[:1]) == ["memory.footprint"]
