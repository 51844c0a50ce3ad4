"""What a session would take: seconds by cost or by an earlier report, downloads by the Hub, memory by prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from harness.core.errors import MissingAsset
from harness.core.options import Declared, Options
from harness.core.records import Case, Row
from harness.core.specification import parse, parse_reference
from harness.inputs import hub
from harness.inputs.hub import Snapshot
from harness.inputs.models import names
from harness.results.directory import ReportDirectory
from harness.run import forecast, plan, prediction
from harness.run.forecast import Fetch, Need, duration

GIB = 2**30


def asked(folder: Path, **given: Any) -> Options:
    chosen: dict[str, Any] = {"models": (parse("tiny-gpt2"),), "methods": (parse("nf4"),), "max_tokens": 4096}
    return Options(Declared(folder), report_dir=folder / "report", **{**chosen, **given})


def cases(options: Options) -> tuple[Case, ...]:
    return plan.plan(options, cuda_visible=False)


def test_costs_follow_text_and_repetitions(tmp_path: Path) -> None:
    options = asked(tmp_path, models=(parse("smollm2-135m"),), metrics=("perplexity", "latency.decode"))
    planned = cases(options)
    usual = forecast.forecast(planned, options)
    assert list(usual.seconds) == [case.id for case in planned]
    assert usual.total > sum(usual.seconds.values())
    assert "two cores" in usual.basis
    synthetic = replace(options, max_tokens=16384, repetitions=20, datasets=(parse("synthetic"),))
    longer = forecast.forecast(cases(synthetic), synthetic)
    perplexity, decode = (f"smollm2-135m/fp32/{name}/cpu" for name in ("lee/chunk:512/perplexity", "latency.decode"))
    more = longer.seconds[perplexity.replace("lee", "synthetic")] - usual.seconds[perplexity]
    assert more == pytest.approx(3 * 8.0)  # four times the tokens; loading is paid once
    assert longer.seconds[decode] == pytest.approx(2 * usual.seconds[decode])


def test_an_earlier_report_is_the_better_prophet(tmp_path: Path) -> None:
    options = asked(tmp_path, metrics=("memory.storage", "memory.footprint"), methods=(parse("nf4"), parse("fp4")))
    planned = cases(options)
    directory = ReportDirectory(options.report_dir)
    directory.open(keep=False)
    known = [case for case in planned if case.method != "fp4"]
    for case in known:
        directory.append(Row.of(case, value=1.0, unit="B", seconds=30.0), {})
    found = forecast.forecast(planned, options)
    assert all(found.seconds[case.id] == 30.0 for case in known)
    assert sum(found.seconds[case.id] for case in planned if case.method == "fp4") > 30.0
    assert found.basis == f"from the report in {options.report_dir}"
    resumed = forecast.forecast(planned, replace(options, resume=True))
    assert all(resumed.seconds[case.id] == 0.0 for case in known)
    assert "4 cases stay" in resumed.basis
    assert forecast.forecast(known, replace(options, resume=True)).total == 0.0


def test_what_comes_from_the_hub_is_named_with_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = (parse("gpt2"), parse("olmo-1b"), parse("hub:org/private"), parse("tiny-gpt2"))
    options = asked(tmp_path, models=asked_for, datasets=(parse("lee"), parse("wikitext-2")))
    there = {"gpt2": Snapshot("org/gpt2", "c", names=("a", "b")), "olmo-1b": Snapshot("org/olmo", "c", tmp_path)}

    def locate(specification: Any, declared: Declared, **allowed: bool) -> names.Located:
        if str(specification) not in there:
            raise MissingAsset("the Hub shows no such model")
        return names.Located("snapshot", snapshot=there[str(specification)])

    api = SimpleNamespace(get_paths_info=lambda *given, **options: [SimpleNamespace(size=3 << 30) for _ in given[1]])
    monkeypatch.setattr(names, "locate", locate)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *given, **options: None)
    monkeypatch.setattr(hub, "has_text", lambda repository: False)
    fetched = forecast.downloads(cases(options), options)
    private = Fetch("hub:org/private", None, "the Hub shows no such model")
    assert fetched == [Fetch("gpt2", 6 << 30), private, Fetch("wikitext-2", None)]
    told = forecast.in_short(cases(options), options, forecast.forecast(cases(options), options), fetched)
    assert "download: gpt2: 6.0 GiB, wikitext-2: –; 6.0 GiB together" in told
    assert "not at hand: the Hub shows no such model" in told
    monkeypatch.setattr(hub, "free_space", lambda: GIB)
    lines, fits = forecast.in_full([], fetched)
    assert not fits
    assert lines[-1].startswith("the download does not fit: 6.0 GiB, 1.0 GiB free")


def test_needs_hold_the_reference_beside_the_model_where_times_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_of = {"fp32": (100, 200), "nf4": (30, 150)}  # kept, and at most while loading

    def predict(model: str, method: str, device: str) -> tuple[int, int]:
        if method not in bytes_of:
            raise MissingAsset("it is not there")
        return bytes_of[method]

    monkeypatch.setattr(prediction, "kept_and_peak", predict)
    asked_for = {"metrics": ("memory.storage", "latency.decode"), "methods": (parse("nf4"), parse("fp4"))}
    planned = cases(asked(tmp_path, **asked_for))
    seconds = dict.fromkeys((case.id for case in planned), 2.0)
    reference, nf4, wrong = forecast.needs(planned, asked(tmp_path), seconds)
    assert (reference.method, reference.cases, reference.seconds) == ("fp32", 2, 4.0)
    assert (reference.storage, reference.peak) == (100, 200 + forecast.PROCESS_BYTES)
    assert (nf4.storage, nf4.peak) == (30, 230 + forecast.PROCESS_BYTES)
    assert (wrong.peak, wrong.trouble) == (None, "it is not there")
    assert forecast.in_full([wrong], [])[0][-1] == "it is not there"
    alone = [case for case in planned if case.metric == "memory.storage"]
    assert forecast.needs(alone, asked(tmp_path), seconds)[1].peak == 150 + forecast.PROCESS_BYTES


def test_a_reference_of_another_model_is_predicted_and_downloaded_by_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted: list[tuple[str, ...]] = []

    def predict(*given: str) -> tuple[int, int]:
        predicted.append(given)
        return (100, 200) if given[0] == "hub:org/base" else (30, 40)

    located: list[str] = []

    def locate(specification: Any, declared: Declared, **allowed: bool) -> names.Located:
        located.append(str(specification))
        raise MissingAsset("the Hub is out of reach")

    monkeypatch.setattr(prediction, "kept_and_peak", predict)
    monkeypatch.setattr(names, "locate", locate)
    metrics = ("memory.storage", "latency.decode")
    options = asked(tmp_path, metrics=metrics, reference=parse_reference("bf16=hub:org/base"), datasets=())
    planned = cases(options)
    reference, nf4 = forecast.needs(planned, options, dict.fromkeys((case.id for case in planned), 2.0))
    assert set(predicted) == {("hub:org/base", "bf16", "cpu"), ("tiny-gpt2", "nf4", "cpu")}
    assert (reference.method, reference.trouble, reference.storage) == ("bf16=hub:org/base", "", 100)
    assert (nf4.storage, nf4.peak) == (30, 230 + forecast.PROCESS_BYTES)
    assert [fetch.what for fetch in forecast.downloads(planned, options)] == ["hub:org/base"]
    assert located == ["hub:org/base"]


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "room", lambda device: 2 * GIB)
    wanted = [Need("m", "fp32", "cpu", 2, 60.0, GIB, 3 * GIB), Need("m", "nf4", "cpu", 2, 9.0, GIB // 4, GIB)]
    lines, fits = forecast.in_full(wanted, [])
    assert not fits
    assert lines[2].split() == ["m", "fp32", "cpu", "2", "1", "min", "1,024", "3,072", "no"]
    assert lines[3].split()[-1] == "yes"
    assert lines[-1] == "m under fp32 does not fit: 3.0 GiB at its peak, 2.0 GiB free here"
    assert forecast.in_full(wanted[1:], [])[1]
    monkeypatch.setattr(forecast, "room", lambda device: 0)  # nobody says how much there is
    assert forecast.in_full(wanted, [])[1]


def test_memory_here_is_the_smaller_of_machine_and_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, container = tmp_path / "meminfo", tmp_path / "max"
    machine.write_text("MemTotal: 99 kB\nMemAvailable:    2048 kB\n")
    monkeypatch.setattr(forecast, "AVAILABLE", machine)
    monkeypatch.setattr(forecast, "LIMIT", container)
    assert forecast.room("cpu") == 2048 * 1024
    container.write_text("max\n")
    assert forecast.room("cpu") == 2048 * 1024
    container.write_text("1024\n")
    assert forecast.room("cpu") == 1024


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.7, "60 s"), (89, "1 min"), (3599, "1 h 0 min"), (7512, "2 h 5 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
