"""The invariants of the core methods on the pretended card: each holds, or a known fault says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import bnb, known_faults, planning
from harness.group import Group
from harness.invariants import LAYER, MODELS
from harness.layergroup import LayerGroup
from harness.messages import Job
from harness.options import Declared, Options
from harness.records import Verdict
from harness.specifications import parse_list
from tests.rehearsal.card import pretended
from tests.rehearsal.measuring import CORE, REFERENCES, Silent

BASELINES = Path(__file__).parents[2] / "baselines"
GREEN = (Verdict.WITHIN_BOUND, Verdict.SAME, Verdict.BETTER)  # it holds, looks like a known fault, or is rid of one
METHODS = ",".join(method for method in CORE if method not in REFERENCES)
PLAN = planning.invariant_plan(
    Options(declared=Declared(Path.cwd()), methods=parse_list(METHODS), device="cuda"), cuda_visible=True
)
LATER = MODELS[1]  # at length only


@pytest.mark.parametrize(
    ("model", "method"),
    [
        pytest.param(model, method, marks=pytest.mark.long if model == LATER else ())
        for model, method in dict.fromkeys((case.model, case.method) for case in PLAN)
    ],
)
def test_invariants(model: str, method: str, tmp_path: Path, one_thread: None) -> None:
    options = Options(declared=Declared(tmp_path), methods=parse_list(method), device="cuda", report_dir=tmp_path)
    job = Job(options, model, method, "cuda", "fp32", 1, tmp_path / "log")
    known = known_faults.load(BASELINES)
    with pretended(), bnb.quiet():
        group = LayerGroup(job) if model == LAYER else Group(job, Silent())  # type: ignore[arg-type]
        for case in PLAN:
            if (case.model, case.method) == (model, method):
                row = known_faults.judge(group.measure(case), known, group.environment)
                assert row.verdict in GREEN, f"{case.id}: {row.value} {row.reason}"
