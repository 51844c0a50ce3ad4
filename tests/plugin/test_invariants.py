"""Invariants as pytest cases: asked for by mark, held to known faults, told in the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.plugin.conftest import Project

FAULT = """
[[fault]]
id = "{id}"
invariant = ["{invariant}"]
on = ["layer"]
methods = ["bnb-int8"]
package = "bitsandbytes"
versions = ">=0.1"
figure = [{low}, {high}]
reference = "somewhere"
summary = "what is seen"
"""
RUN = ("--methods", "bnb-int8", "-m", "invariant", "-k", "layer and (rows or run_twice)")


def test_invariants_run_when_asked_and_are_held_to_known_faults(project: Project) -> None:
    project.write("test_invariants.py", "from harness.cases.test_invariants import test_invariant\n")
    elsewhere = FAULT.format(id="rows-depend-on-their-batch", invariant="rows", low=1, high=2)
    project.write("baselines/known_faults.toml", "schema = 1\n" + elsewhere)
    new = project.run(*RUN)  # rows of LLM.int8 depend on their batch; the package's entry says so, which is taken here
    new.assert_outcomes(passed=1, failed=1, deselected=47)
    assert "looks different: a figure of 1 to 2" in new.stdout.str()
    assert "--pyargs harness.cases -m invariant --harness-methods bnb-int8" in new.stdout.str()

    known = FAULT.format(id="batch", invariant="rows", low=1e-5, high=0.05)
    known += FAULT.format(id="twice", invariant="run_twice", low=1, high=2)
    project.write("baselines/known_faults.toml", "schema = 1\n" + known)
    assert project.run(*RUN, "-n", "2").ret == 0
    rows = {row["metric"]: row for row in project.rows()}
    assert rows["invariant.rows"]["detail"]["fault"] == "batch"
    assert rows["invariant.run_twice"]["verdict"] == "better"
    assert "the known fault batch (somewhere)" in project.report()
    assert "known fault twice (somewhere) is gone here" in project.report()


def test_they_are_not_run_unasked(project: Project) -> None:
    project.write("test_invariants.py", "from harness.cases.test_invariants import test_invariant\n")
    every = project.look("--methods", "bnb-int8", "--collect-only", "-q", "--metrics", "all")
    assert "invariant." not in every.stdout.str()
