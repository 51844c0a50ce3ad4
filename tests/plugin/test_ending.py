"""The end of a measuring session: its last lines, and signals, each sent to this process at a known moment."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.core.options import Declared, Options, Shard
from harness.core.records import Case, Row, Verdict
from harness.plugin.collector import Collector
from harness.plugin.ending import ENDING, FOLDED, Ending, closing
from harness.plugin.state import ROW


@pytest.fixture
def unhandled() -> Iterator[None]:
    """As in a plain pytest, whatever else this one runs under."""
    before: dict[int, Any] = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind a shell's &
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("unhandled")
@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_the_session_as_an_interruption_with_the_shells_status(number: int) -> None:
    ending = Ending()
    with pytest.raises(KeyboardInterrupt, match="ended by SIG"):
        signal.raise_signal(number)
    session: Any = SimpleNamespace(exitstatus=2)
    assert list(ending.pytest_sessionfinish(session)) == [None]
    assert session.exitstatus == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.usefixtures("unhandled")
def test_other_peoples_handlers_and_ignored_signals_stay() -> None:
    theirs: Any = lambda number, frame: None  # noqa: E731
    signal.signal(signal.SIGTERM, theirs)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ending = Ending()
    assert ending.taken == []
    ending.pytest_unconfigure()
    assert signal.getsignal(signal.SIGTERM) is theirs
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.usefixtures("unhandled")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 2)])
def test_what_comes_while_the_report_is_written_waits(number: int, status: int) -> None:
    session: Any = SimpleNamespace(exitstatus=0)
    writing = Ending().pytest_sessionfinish(session)
    next(writing)
    signal.raise_signal(number)
    assert list(writing) == []
    assert session.exitstatus == status
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.usefixtures("unhandled")
def test_a_second_interruption_is_obeyed() -> None:
    session: Any = SimpleNamespace(exitstatus=0)
    writing = Ending().pytest_sessionfinish(session)
    next(writing)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    writing.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def row(method: str, metric: str, value: float | None, text: str = "", **given: Any) -> Row:
    case = Case(given.pop("model", "gpt2"), method, text, "chunk:512" if text else "", metric, "cpu")
    return Row.of(case, value=value, **{"verdict": Verdict.UNRECORDED, **given})


def rows(methods: int = 2, model: str = "gpt2") -> list[Row]:
    found = [row("fp32", "perplexity", 30.0, "lee", model=model), row("fp32", "memory.storage", 2.0**29, model=model)]
    for number in range(methods):
        name, delta = f"m{number}", math.log(1.1)
        found.append(row(name, "perplexity.delta", delta, "lee", interval=(delta - 0.01, delta + 0.01), model=model))
        found.append(row(name, "memory.storage", 2.0**27, model=model))
        ratio = {"log_ratio": math.log(0.9), "log_ratio_low": -0.2, "log_ratio_high": 0.0, "log_ratio_usable": True}
        found.append(row(name, "latency.decode", 0.01, unit="s", detail=ratio, model=model))
    return found


def collected(rows: list[Row], tmp_path: Path, recorded: Any = None, **options: Any) -> Any:
    """A collector at its end."""
    chosen = Options(Declared(tmp_path), report_dir=Path("out"), baselines=Path("baselines"), **options)
    directory = SimpleNamespace(waits=not any(row.value is not None for row in rows))
    state = SimpleNamespace(options=chosen, session=SimpleNamespace(directory=directory))
    path = None if directory.waits else Path("out/report.md")
    by_id = {row.case.id: row for row in rows}
    return SimpleNamespace(state=state, rows=by_id, recorded=recorded, report_path=path)


def closed(collector: Any, *arguments: str) -> list[str]:
    config: Any = SimpleNamespace(invocation_params=SimpleNamespace(args=arguments))
    return closing(collector, config)


def test_the_last_lines_have_a_table_the_report_and_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    found = rows()
    found[2] = replace(found[2], verdict=Verdict.WORSE, verdict_baseline=Verdict.WORSE)
    lines = closed(collected(found, tmp_path), "--methods", "m0,m1")
    table = [line.split() for line in lines if line.startswith(("method", "fp32", "m0", "m1"))]
    assert table == [
        "method ratio [95%] MiB decode x quality memory speed".split(),
        "fp32 (reference) 1 512.00 – unrecorded unrecorded –".split(),
        "m0 1.1000 [1.0891, 1.1111] 128.00 0.90 worse unrecorded unrecorded".split(),
        "m1 1.1000 [1.0891, 1.1111] 128.00 0.90 unrecorded unrecorded unrecorded".split(),
    ]
    monkeypatch.setenv("COLUMNS", "80")
    narrow = [line for line in closed(collected(found, tmp_path)) if line.startswith(("method", "fp32", "m"))]
    assert narrow[0].endswith("decode x  verdict")
    assert [line.rpartition("  ")[2] for line in narrow[1:]] == ["unrecorded", "worse (quality)", "unrecorded"]
    assert lines[-3:-1] == ["report: out/report.md", "browser: out/report.html"]
    assert (
        lines[-1] == "next: to see what would be recorded if these changes are meant: python -m harness rebaseline out"
    )


def test_a_table_of_many_is_folded_and_keeps_what_failed(tmp_path: Path) -> None:
    found = rows(30) + rows(3, "olmo-1b")
    found[-1] = replace(found[-1], verdict=Verdict.WORSE, verdict_baseline=Verdict.WORSE)
    lines = closed(collected(found, tmp_path))
    assert sum(line.startswith(("gpt2", "olmo-1b")) for line in lines) == FOLDED
    assert "olmo-1b  m2" in "\n".join(lines)
    assert "… and 15 lines more, in the report" in lines


@pytest.mark.parametrize(
    ("given", "arguments", "step"),
    [
        ({}, ("-k", "a b"), "to record these figures and hold later ones against them: pytest -k 'a b' --regen-all"),
        ({"missing": True}, ("--resume",), "to measure what is missing: pytest --resume"),
        ({"missing": True, "allow_missing": True}, (), ""),
        ({"left": True, "verdict": Verdict.SAME}, (), "to see what is beaten by what: python -m harness frontier out"),
        (
            {"regenerate": "all"},
            ("--regen-all",),
            "to see what was recorded: git add -N baselines && git diff",
        ),
        ({"shard": Shard(1, 2)}, (), "when every shard is there: python -m harness merge DIR... -o whole"),
        ({"verdict": Verdict.SAME}, (), "to see what is beaten by what: python -m harness frontier out"),
    ],
)
def test_the_next_command(tmp_path: Path, given: dict[str, Any], arguments: tuple[str, ...], step: str) -> None:
    verdict = given.pop("verdict", Verdict.UNRECORDED)
    found = [replace(one, verdict=verdict, verdict_baseline=verdict) for one in rows()]
    if given.pop("missing", False):
        found.append(row("m9", "perplexity", None, "lee", reason="not reached: the session stopped before it"))
    if given.pop("left", False):  # nothing measures it later
        found.append(row("m9", "perplexity.word", None, "lee", verdict=Verdict.NOT_COMPARABLE, reason="left out: none"))
    lines = closed(collected(found, tmp_path, **given), *arguments)
    said = [line.removeprefix("next: ") for line in lines if line.startswith("next: ")]
    assert len(said) == bool(step)
    assert not said or said[0].startswith(step)


def test_the_summary_counts_what_was_left_out_by_itself(tmp_path: Path) -> None:
    found = [*rows(), row("m8", "perplexity", None, "lee", verdict=Verdict.MISSING, reason="killed")]
    found.append(row("m9", "perplexity.word", None, "lee", verdict=Verdict.NOT_COMPARABLE, reason="left out: none"))
    lines: list[str] = []
    collector = Collector(collected(found, tmp_path).state)
    collector.opened, collector.rows, collector.report_path = True, {one.case.id: one for one in found}, Path("out")
    config = SimpleNamespace(invocation_params=SimpleNamespace(args=()))
    writer = SimpleNamespace(section=lines.append, write_line=lines.append, config=config)
    collector.pytest_terminal_summary(writer)
    assert lines[1:4] == ["10 planned, 8 ran, 1 missing, 1 left out", "missing 1: killed", "left out 1: none"]


def test_what_was_recorded_is_said_and_what_was_not_measured(tmp_path: Path) -> None:
    lines = closed(collected(rows(), tmp_path, recorded=(7, [Path("a"), Path("b")]), regenerate="all"))
    assert "recorded: 7 figures into 2 files, and exact facts, in baselines" in lines
    nothing = [replace(one, value=None) for one in rows()]
    assert closed(collected(nothing, tmp_path)) == ["nothing was measured: out stays as it was"]


@pytest.mark.parametrize(("outcome", "letter"), [("passed", "."), ("failed", "F"), ("rerun", "R")])
def test_a_case_that_is_run_again_is_told_as_elsewhere(outcome: str, letter: str) -> None:
    report: Any = SimpleNamespace(when="call", skipped=False, outcome=outcome)
    report.user_properties = [(ROW, rows()[0].to_json())]
    told = Collector.pytest_report_teststatus(SimpleNamespace(), report)  # type: ignore[arg-type]
    assert told is not None
    assert told[:2] == (outcome, letter)
