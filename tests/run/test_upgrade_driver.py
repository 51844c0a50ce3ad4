"""The whole of an upgrade through fake sides: alternation, one line for what fails, the report and the exit status."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import harness
from harness import __main__ as commands
from harness import report
from harness.core.errors import HarnessError
from harness.core.options import Options
from harness.core.records import Case, Row, Verdict
from harness.results import losses as nllfiles
from harness.run.messages import Repetition
from harness.run.upgrade import driver
from harness.run.upgrade.process import SideFailed, SideGone

WINDOWS = [8] * 12
TOKENS = np.random.default_rng(0).gamma(2.0, 1.0, sum(WINDOWS)).astype(np.float32)


@dataclass
class World:
    """What each fake side does, and who was asked in which order."""

    change: dict[str, Callable[[Row], Row]] = field(default_factory=dict)  # by label
    seconds: dict[str, float] = field(default_factory=dict)
    unbuilt: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)


def measured(case: Case, folder: Path, label: str) -> Row:
    """A plain row of a case, its losses written as a side would."""
    if case.family == "invariant":
        return Row.of(case, value=0.0, detail={"holds": True}, environment="e")
    if case.family == "perplexity":
        sha = nllfiles.save(folder / "nll", TOKENS)
        detail = {"window_counts": WINDOWS, "reference_nll": sha}
        return Row.of(case, value=float(np.exp(TOKENS.mean())), unit="ppl", nll=sha, detail=detail, environment="e")
    return Row.of(case, value=1000.0, unit="B", environment="e")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    told = World()

    def build(side: Any, say: Any) -> tuple[Path, dict[str, str]]:
        if side.label in told.unbuilt:
            raise HarnessError(told.unbuilt[side.label])
        return Path(side.label), {"bitsandbytes": side.label.rpartition("==")[2], "torch": "2.13.0"}

    class Remote:
        def __init__(self, python: Path, options: Options, threads: int, log: Path) -> None:
            self.label, self.folder = str(python), options.report_dir

        def ask(self, verb: str, argument: Any, say: Any = None) -> Any:
            if verb == "prepare":
                return {}
            case = argument.case if isinstance(argument, Repetition) else argument
            told.asked.append((self.label, case.metric))
            if verb == "repetition" and argument.figure is None:
                return {"seconds": told.seconds.get(self.label, 0.01), "prompt_tokens": 128, "new_tokens": 1}
            row = measured(case, self.folder, self.label)
            if verb == "repetition":
                figure = argument.figure
                row = Row.of(case, value=figure.value, unit="s", samples=figure.samples, detail=figure.detail)
            return (
                (told.change[self.label](row) if self.label in told.change else row),
                "",
                {"device": "cpu", "cpu": "a processor"},
            )

        def close(self) -> None:
            told.closed.append(self.label)

    monkeypatch.setattr("harness.run.upgrade.driver.build", build)
    monkeypatch.setattr(driver, "Remote", Remote)
    monkeypatch.setattr("harness.report.document.svgs", lambda rows, planned: {})  # slow, and tested elsewhere
    monkeypatch.setattr("harness.core.gpus.cuda_devices", lambda: [])
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return told


def upgrade(
    *sides: str, methods: str = "bnb-nf4", metrics: str = "invariant,perplexity,memory.storage,latency.decode"
) -> int:
    arguments = ["upgrade", *sides, "--models", "tiny-gpt2", "--datasets", "synthetic", "--methods", methods]
    return commands.main([*arguments, "--metrics", metrics, "--repetitions", "8", "--report-dir", "out"])


A, B, C = "bitsandbytes==0.48.2", "bitsandbytes==0.49.2", "bitsandbytes==0.50.2"


def text() -> str:
    return Path("out/upgrade.md").read_text()


def test_nothing_moves(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert upgrade(A, C, metrics="invariant,perplexity,memory.storage,latency.decode") == 0
    assert capsys.readouterr().out.strip() == text().strip()
    assert "does no harm that was measured" in text()
    assert "bitsandbytes`: 0.48.2 -\\> 0.50.2" in text() or "bitsandbytes`: 0.48.2 -> 0.50.2" in text()
    assert "1 package equal on every side" in text()
    first = [label for label, metric in world.asked if metric == "invariant.product.fp32"]
    second = [label for label, metric in world.asked if metric == "invariant.product.bf16"]
    assert first[:2] == [A, C]
    assert second[:2] == [C, A]  # the sides alternate in who is first
    assert sorted(world.closed) == [A, C]
    assert commands.main(["compare", "out/bitsandbytes-0.48.2", "out/bitsandbytes-0.50.2"]) == 0


def worse(method: str, by: float) -> Callable[[Row], Row]:
    """A side on which one method loses `by` nats a token."""

    def change(row: Row) -> Row:
        if row.method != method or row.case.family != "perplexity":
            return row
        folder = Path("out/bitsandbytes-0.50.2/nll")
        losses = TOKENS + np.float32(by)
        return replace(row, nll=nllfiles.save(folder, losses), value=float(np.exp(losses.mean())))

    return change


def test_a_method_that_loses_is_accused_and_no_other(world: World) -> None:
    world.change[C] = worse("bnb-nf4", 0.01)
    assert upgrade(A, C, methods="bnb-nf4,bnb-int8", metrics="perplexity") == 1
    compared = harness.compare(Path("out/bitsandbytes-0.48.2"), Path("out/bitsandbytes-0.50.2"))
    accused = [(entry.case.method, entry.case.metric) for entry in compared.entries if entry.verdict is Verdict.WORSE]
    assert set(accused) == {("bnb-nf4", "perplexity"), ("bnb-nf4", "perplexity.delta")}
    assert "worse for `bnb-nf4` on `tiny-gpt2` +1.01%" in text()


def test_slower_is_harm_and_prefill_and_decode_stand_apart(world: World) -> None:
    world.seconds = {A: 0.01, C: 0.02}
    assert upgrade(A, C, metrics="latency.prefill,latency.decode") == 1
    assert "Decode: slower for `fp32` 2 times" in text()
    assert "## Speed: prefill" in text()
    assert "## Speed: decode" in text()


def test_a_side_that_cannot_be_built_says_so_in_its_rows(world: World) -> None:
    world.unbuilt[B] = "bitsandbytes==0.49.2 cannot be installed: No matching distribution found"
    assert upgrade(A, B, C) == 1
    rows = report.read_report(Path("out/bitsandbytes-0.49.2")).rows
    assert {(row.value, row.reason) for row in rows} == {(None, world.unbuilt[B])}
    assert f"- bitsandbytes==0.49.2: {world.unbuilt[B]}" in text().replace("\\", "")
    whole = harness.compare(Path("out/bitsandbytes-0.48.2"), Path("out/bitsandbytes-0.50.2"))
    assert whole.status == 0  # the rest is still compared


def test_no_side_at_all_is_a_users_mistake(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.unbuilt = {A: "no wheel", C: "no wheel either"}
    assert upgrade(A, C) == 2
    assert "no side can be measured: no wheel; no wheel either" in capsys.readouterr().err


def test_no_card_is_one_line_before_any_side_is_built(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("harness.core.environment.cuda_devices", lambda: [])
    world.unbuilt = {A: "no wheel", C: "no wheel either"}
    arguments = ["upgrade", A, C, "--models", "tiny-gpt2", "--metrics", "memory.storage", "--device", "cuda"]
    assert commands.main([*arguments, "--report-dir", "out"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].partition("no CUDA device: ")[2]
    assert not Path("out").exists()


def test_an_unsupported_method_is_one_line(world: World) -> None:
    def unsupported(row: Row) -> Row:
        data = {**row.told(), "value": None, "verdict": Verdict.MISSING, "reason": "FP4 needs bitsandbytes 0.47"}
        return Row(**data) if row.method == "bnb-fp4" else row

    world.change[A] = unsupported
    assert upgrade(A, C, methods="bnb-fp4,bnb-nf4") == 3
    assert "FP4 needs bitsandbytes 0.47" in text()
    assert "did not run on both sides (`bnb-fp4`)" in text()


@pytest.mark.parametrize(
    ("error", "reason"), [(SideGone("it died"), "it died"), (SideFailed("refused"), "refused"), (None, "KeyError: 'x'")]
)
def test_a_process_that_fails(world: World, error: HarnessError | None, reason: str) -> None:
    def fail(row: Row) -> Row:
        if row.method == "bnb-nf4" and row.metric == "memory.storage":
            raise error or RuntimeError("Traceback\n  in a file\nKeyError: 'x'")
        return row

    world.change[C] = fail
    assert upgrade(A, C) == 1
    rows = {row.case: row for row in report.read_report(Path("out/bitsandbytes-0.50.2")).rows}
    failed = [row for row in rows.values() if row.value is None]
    assert reason in {row.reason for row in failed}
    assert len(failed) == (1 if not isinstance(error, SideGone) else len(failed))
    assert len(rows) == len(json.loads(Path("out/bitsandbytes-0.50.2/plan.json").read_text()))


def test_usage(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert upgrade(A) == 2
    assert upgrade(A, "torch==2.13.0") == 2
    assert upgrade(A, C, methods="bnb-nf5") == 2
    assert "did you mean" in capsys.readouterr().err


def test_the_steps_that_are_compared() -> None:
    assert driver.pairs(2) == [(0, 1)]
    assert driver.pairs(4) == [(0, 1), (1, 2), (2, 3), (0, 3)]


def test_a_broken_invariant_is_named_with_its_fault(world: World) -> None:
    def broken(row: Row) -> Row:
        if row.metric != "invariant.state_dict":
            return row
        detail = {"holds": False, "fault": "state-dict-after-forward", "reference": "tracker#1"}
        return Row(**{**row.told(), "value": 1.14, "detail": detail, "verdict": Verdict.SAME})

    world.change[C] = broken
    assert upgrade(A, C, metrics="invariant") == 1
    assert "3 checks no longer hold: `state_dict` (`bnb-nf4`)" in text()
    assert "known faults, each with its reference" in text()
    assert "`state-dict-after-forward`: tracker#1" in text()


def test_an_upgrade_that_measures_nothing_leaves_the_earlier_one(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    def unmeasured(row: Row) -> Row:
        return Row.of(row.case, verdict=Verdict.MISSING, reason="no memory")

    assert upgrade(A, C, metrics="memory.storage") == 0
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    world.change = {A: unmeasured, C: unmeasured}
    assert upgrade(A, C, metrics="memory.storage") == 2
    assert "stays as it was: no memory" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    world.change = {A: unmeasured}  # a side that did measure takes the others' reports with it
    assert upgrade(A, C, metrics="memory.storage") == 3
    assert {row.reason for row in report.read_report(Path("out/bitsandbytes-0.48.2")).rows} == {"no memory"}


def test_a_folder_of_the_user_s_own_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/upgrade.md").write_text("my notes")
    assert upgrade(A, C, metrics="memory.storage") == 2
    assert "holds 'upgrade.md' and no report of the harness" in capsys.readouterr().err
    assert text() == "my notes"
    assert not world.asked
