"""A check that does not hold is measured once more; one that fails both times fails."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from harness.core.contracts import Member
from harness.core.records import Figure
from harness.metrics import invariant
from harness.metrics.measuring import invariant_checks
from harness.metrics.measuring.checks import CHECKS, metric

MEMBERS = {check.name: Member(metric(check), "", "lower", textual=False) for check in CHECKS}
SUBJECT: Any = SimpleNamespace(case=SimpleNamespace(model="tiny-gpt2"))


def measured(monkeypatch: pytest.MonkeyPatch, name: str, *values: float) -> Figure:
    """What the metric says where a check finds these values, one a call; 0 holds."""
    left = iter(values)

    def check(subject: Any) -> Figure:
        value = next(left)
        return Figure(value, "", detail={"holds": value == 0, "limit": "0"})

    checks: dict[str, Callable[[Any], Figure]] = {**invariant_checks.CHECKS, name: check}
    monkeypatch.setattr(invariant_checks, "CHECKS", checks)
    return invariant.measure(SUBJECT, MEMBERS[name])


def test_a_difference_that_does_not_come_again_is_kept_beside_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, "state_dict", 5e-6, 0.0)
    assert (found.value, found.detail["holds"], found.detail["at_first"]) == (0.0, True, 5e-6)


def test_a_difference_that_comes_again_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, "state_dict", 5e-6, 4e-6)
    assert (found.value, found.detail["holds"]) == (5e-6, False)
    assert "at_first" not in found.detail


def test_two_runs_that_differ_fail_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(monkeypatch, "run_twice", 5e-6, 0.0).value == 5e-6


def test_what_holds_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(monkeypatch, "state_dict", 0.0).detail == {"holds": True, "limit": "0"}


def test_an_exception_is_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(subject: Any) -> Figure:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(invariant_checks, "CHECKS", {**invariant_checks.CHECKS, "state_dict": check})
    found = invariant.measure(SUBJECT, MEMBERS["state_dict"])
    assert found.detail == {"holds": False, "exception": "RuntimeError: no such kernel"}


def test_equal_is_of_bits() -> None:
    torch = pytest.importorskip("torch")
    assert not invariant_checks.equal(torch.tensor([1.0]), torch.tensor([1.0 + 2**-23])).detail["holds"]


@pytest.mark.parametrize(
    ("said", "finding"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 MiB.", False),
        ("CUDA error: no kernel image is available for execution on the device", False),
        ("CUDA error: invalid configuration argument", True),  # which the library asked for
    ],
)
def test_want_of_memory_or_of_a_kernel_is_no_word_on_the_library(
    monkeypatch: pytest.MonkeyPatch, said: str, finding: bool
) -> None:
    def check(subject: Any) -> Figure:
        raise RuntimeError(said)

    monkeypatch.setattr(invariant_checks, "CHECKS", {**invariant_checks.CHECKS, "state_dict": check})
    if finding:
        assert invariant.measure(SUBJECT, MEMBERS["state_dict"]).detail["exception"] == f"RuntimeError: {said}"
        return
    with pytest.raises(RuntimeError, match=said):
        invariant.measure(SUBJECT, MEMBERS["state_dict"])
