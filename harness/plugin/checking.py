"""The `harness_check` fixture at work: one case measured and judged, what its test says, and what it hands on."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from harness import judge
from harness.core.files import rewritten
from harness.core.records import Case, Row, Verdict
from harness.judge import baselines
from harness.judge.baselines import exact_document, exact_path, holds, provenance, read_exact

if TYPE_CHECKING:
    from harness.plugin.state import State

ROW, ENVIRONMENT, UNWRITTEN = "harness_row", "harness_environment", "harness_unwritten"


@dataclass(frozen=True)
class CallOutcome:
    """What a test leaves for the controller: properties of its report, which pytest-xdist carries between processes."""

    row: Row
    world: Mapping[str, Any] = field(default_factory=dict)  # the environment it was measured in
    unwritten: str = ""  # why a record could not be written

    @classmethod
    def of(cls, report: Any) -> CallOutcome | None:
        """That of a test's report; None where the test measured no case."""
        properties: dict[str, Any] = dict(getattr(report, "user_properties", ()))
        text = properties.get(ROW)
        if not isinstance(text, str):
            return None
        return cls(Row.from_json(text), properties.get(ENVIRONMENT, {}), str(properties.get(UNWRITTEN, "")))


def check(request: pytest.FixtureRequest, state: State, case: Case) -> Row:
    """Measure and judge one case; fails with a small report where the session must fail."""
    __tracebackhide__ = True
    row, trouble = state.session.check(case, reason_missing=state.absent(case))
    request.node.user_properties.append((ROW, row.to_json()))
    if row.environment:
        request.node.user_properties.append((ENVIRONMENT, dict(state.session.world(row))))
    if trouble:
        pytest.fail(f"{case.id}: a bug met while measuring\n{trouble}", pytrace=False)
    if row.verdict is Verdict.MISSING and state.options.allow_missing:
        pytest.skip(f"missing: {row.reason}")
    hold_facts(request, state, row)
    conclude(state, row)
    return row


def hold_facts(request: pytest.FixtureRequest, state: State, row: Row) -> None:
    """Exact facts against `<method>.yaml` through pytest-regressions; nothing is written without its flags."""
    __tracebackhide__ = True
    facts = {} if row.value is None else state.session.facts(row)
    if not facts:
        return
    path = exact_path(state.options.baselines, row.case)
    recorded = read_exact(path)
    if not state.options.regenerate and (not holds(recorded, facts) or row.verdict_baseline is Verdict.NOT_COMPARABLE):
        return  # the judge says so, with the command that records it
    document = exact_document(recorded, facts, provenance(state.session.world(row)))
    try:  # the fixture writes in place: a kill or a full disk would leave half a file
        with rewritten(path) if state.options.regenerate else contextlib.nullcontext(path) as draft:
            request.getfixturevalue("data_regression").check(document, fullpath=draft)
    except OSError as error:
        request.node.user_properties.append((UNWRITTEN, f"{path} cannot be written ({error.strerror})"))


def conclude(state: State, row: Row) -> None:
    """Fail the test where the session must fail for this row, unless it is being recorded anew."""
    __tracebackhide__ = True
    options = state.options
    if options.regenerate == "all" and row.verdict_reference is not Verdict.OUT_OF_BOUND and row.value is not None:
        return
    if options.regenerate == "force" and row.value is not None and baselines.to_record([row], "force"):
        pytest.fail(f"{row.case.id}: recorded anew because of --force-regen; run again without it", pytrace=False)
    if judge.fails(row, require_baselines=options.require_baselines, allow_missing=options.allow_missing):
        pytest.fail(message(state, row), pytrace=False)


def message(state: State, row: Row) -> str:
    """The failure as a small report that ends with the command to run."""
    if row.value is None:
        return f"{row.case.id}: missing: {row.reason}"
    world = state.session.environment(row)
    return judge.message(row, state.session.baselines.find(row.case, world), world)
