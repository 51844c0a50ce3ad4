"""The front of quality, bytes and speed, on rows made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.__main__ import main
from harness.core.records import Case, Row
from harness.report.account import sections
from harness.report.frontier import Relation, Standing, apart, exactly, heading, points, render, standings
from harness.results import losses

TEXT = ("lee", "chunk:8")
WINDOWS = 16


def rows(
    method: str, nats: np.ndarray[Any, Any], reference: np.ndarray[Any, Any], folder: Path, size: int
) -> list[Row]:
    """A quality and a memory row of a method whose per-token losses are given."""
    from harness.core.stats import paired_delta

    spans = [slice(at * 8, at * 8 + 8) for at in range(WINDOWS)]
    found = paired_delta(nats, reference, spans)
    sha = losses.save(folder / "nll", nats.astype(np.float32))
    text: dict[str, Any] = {
        "nll": sha,
        "token_hash": "t",
        "protocol_id": "p",
        "detail": {"window_counts": [8] * WINDOWS},
    }
    quality = Case("m", method, *TEXT, "perplexity" if method == "fp32" else "perplexity.delta", "cpu")
    memory = Case("m", method, "", "", "memory.storage", "cpu")
    interval = None if method == "fp32" else (found.low, found.high)
    value = 20.0 if method == "fp32" else found.value
    return [Row.of(quality, value=value, interval=interval, **text), Row.of(memory, value=float(size))]


def places(folder: Path, methods: dict[str, tuple[float, float, int]]) -> dict[str, Standing]:
    """Method -> (shift of its losses, noise of a token, bytes)."""
    rng = np.random.default_rng(0)
    reference = rng.normal(3.0, 1.0, 8 * WINDOWS)
    found = rows("fp32", reference, reference, folder, 400)
    for method, (shift, noise, size) in methods.items():
        found += rows(method, reference + shift + rng.normal(0, noise, reference.size), reference, folder, size)
    (section,) = sections(found)
    here = standings(points(section, TEXT), lambda sha: losses.load(folder / "nll", sha))
    shown = render(heading(section, TEXT), here)
    assert "`fp32` (reference)" in shown
    for kind in ("front", "undecided", "dominated"):
        named = ", ".join(f"`{place.point.method}`" for place in here if place.kind == kind)
        assert not named or f"{kind} ({named.count(', ') + 1}): {named}" in shown
    return {place.point.method: place for place in here}


def test_dominated_undecided_and_front(tmp_path: Path) -> None:
    found = places(
        tmp_path,
        {
            "good4": (0.10, 0.01, 100),
            "bad4": (0.50, 0.01, 120),  # larger and worse than good4
            "near4": (0.1001, 0.05, 110),  # larger, quality not to be told apart from good4's
            "tiny2": (1.50, 0.01, 50),
        },
    )
    assert {name: place.words for name, place in found.items()} == {
        "fp32": "front",
        "good4": "front",
        "bad4": "dominated by `good4`, `near4`",
        "near4": "undecided: `good4`",
        "tiny2": "front",
    }
    assert {name: place.ranks for name, place in found.items()} == {
        "fp32": (1, 1),
        "good4": (2, 3),
        "near4": (2, 3),
        "bad4": (4, 4),
        "tiny2": (5, 5),
    }


def test_pairs_are_compared_token_by_token(tmp_path: Path) -> None:
    """Two methods that share their noise are told apart though their own intervals overlap."""
    rng = np.random.default_rng(1)
    reference = rng.normal(3.0, 1.0, 8 * WINDOWS)
    noise = rng.normal(0, 0.5, reference.size)
    found = rows("fp32", reference, reference, tmp_path, 400)
    for method, shift in (("a", 0.2), ("b", 0.25)):
        found += rows(method, reference + noise + shift, reference, tmp_path, 100)
    (section,) = sections(found)
    here = points(section, TEXT)
    by_name = {point.method: point for point in here}
    assert apart(by_name["a"].interval, by_name["b"].interval) is Relation.NOT_SEPARATED
    told = {place.point.method: place for place in standings(here, lambda sha: losses.load(tmp_path / "nll", sha))}
    assert told["b"].dominated_by == ["a"]
    blind = {place.point.method: place for place in standings(here, lambda sha: None)}
    assert blind["b"].dominated_by == []


def test_relations() -> None:
    assert apart((0, 1), (2, 3)) is Relation.BETTER
    assert apart((2, 3), (0, 1)) is Relation.WORSE
    assert apart((0, 2), (1, 3)) is Relation.NOT_SEPARATED
    assert apart(None, (1, 3)) is Relation.NOT_SEPARATED
    assert [exactly(1, 2), exactly(2, 2), exactly(3, 2)] == [Relation.BETTER, Relation.EQUAL, Relation.WORSE]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.report.frontier.LONGEST", 5)  # a model's name may be longer than a file's
    made = Path(__file__).parent / "data" / "made-session"
    assert main(["frontier", str(made), "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| `fp32` (reference)" in out
    assert "some are told apart by chance" in out
    (plot,) = tmp_path.glob("frontier-*.svg")
    assert len(plot.stem) == len("frontier-") + 5 + len("-01234567")
    assert plot.read_text().startswith("<?xml")
    assert str(plot) in out
    assert main(["frontier", str(tmp_path / "none")]) == 2
    assert "holds no measurements" in capsys.readouterr().err
