"""What a session does before it measures: what a resumed one must not lose, and what its workers are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.core.environment import Environment
from harness.core.errors import HarnessError
from harness.core.options import Declared, Options
from harness.core.records import Case, Row
from harness.core.specification import parse
from harness.judge.baselines import Recorded, write_overlay
from harness.results.directory import MEASUREMENTS, ReportDirectory
from harness.run import session as sessions
from harness.run.fingerprints import protocol_of
from harness.run.local import Runner
from harness.run.session import Session

WORLD = Environment(torch="2.13.0")
CASES = [Case(model, "fp32", "", "", "memory.storage", "cpu") for model in ("here", "gone")]


class Prepared(Runner):
    """A runner that can have one model of two."""

    began = False

    def prepare(self, cases: Sequence[Case], say: Any) -> Mapping[str, str]:
        self.unfit = {case: "the Hub is out of reach" for case in cases if case.model == "gone"}
        self.identities = {"x": {"weights": "w"}}
        return {"weights of here": "w"}

    def begin(self, cases: Sequence[Case], ask: Any) -> None:
        self.began = True


def a_session(folder: Path, **given: Any) -> Session:
    options = Options(Declared(folder), report_dir=folder / "report", baselines=folder / "baselines")
    return Session(replace(options, **given), 1, CASES, runner=Prepared)


def opened(session: Session, workers: int = 0) -> None:
    session.open(CASES, lambda line: None, lambda row, world: None, workers)


def test_measured_rows_of_a_model_that_cannot_be_had_now_stay(tmp_path: Path) -> None:
    directory = ReportDirectory(tmp_path / "report")
    directory.own()
    directory.open(keep=False)
    for case in CASES:
        directory.append(Row.of(case, value=1.0, unit="B", environment=WORLD.id), WORLD.to_dict())
    directory.release()
    before = (tmp_path / "report" / MEASUREMENTS).read_bytes()
    resumed: Any = a_session(tmp_path, resume=True)
    with pytest.raises(HarnessError, match=r"^gone cannot be measured now.* stay: run again .*out of reach"):
        opened(resumed)
    assert isinstance(resumed.runner, Prepared)
    assert not resumed.runner.began
    assert (tmp_path / "report" / MEASUREMENTS).read_bytes() == before
    resumed.close()
    anew = a_session(tmp_path)
    opened(anew)  # measures what it can
    anew.close()


def test_workers_do_not_try_again_what_cannot_be_had(tmp_path: Path) -> None:
    controller, worker = a_session(tmp_path), a_session(tmp_path)
    opened(controller, workers=1)
    worker.take_over()
    assert worker.runner.unfit == controller.runner.unfit == {CASES[1]: "the Hub is out of reach"}
    assert worker.runner.identities == controller.runner.identities
    assert worker.runner.inputs == {"weights of here": "w"}
    assert worker.check(CASES[1])[0].reason == "the Hub is out of reach"
    controller.close()
    worker.take_over()  # nothing is left: nothing is held
    assert (worker.runner.unfit, worker.runner.inputs) == ({}, {})


def test_an_early_stop_looks_at_the_record_that_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "capture", lambda *given: WORLD)
    case = Case("m", "nf4", "lee", "chunk:512", "perplexity.delta", "cpu")
    told = (
        "text: lee; tokens: all, tokenizer t; windows: chunks of 256; scored: all; aggregate: mean; normaliser: token"
    )
    known = Recorded(
        case.metric, "cpu", 0.1, "nat", 9, "lee", "chunk:256", interval=(0.0, 0.2),
        protocol_id=told, token_hash="h", environment=WORLD,
    )  # fmt: skip
    reach = WORLD.device_class
    path = tmp_path / "baselines" / "m" / f"nf4@{reach.replace(':', '+')}.yaml"
    path.parent.mkdir(parents=True)
    write_overlay(path, "m", "nf4", reach, [known])
    session = a_session(tmp_path, stop_early=True, metrics=(), methods=(parse("nf4"),))
    unread = session.stop(case)
    session.runner.inputs = {protocol_of("lee", "chunk:512", "m"): told}
    read = session.stop(case)
    assert unread
    assert read
    assert (unread.token_hash, unread.variance) == ("", None)
    assert read.token_hash == "h"
    assert read.variance
