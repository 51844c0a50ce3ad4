"""A session from options to report: what runs, what is written, what fails."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest

if TYPE_CHECKING:
    from tests.plugin.conftest import Project

Pick = Callable[[list[dict[str, Any]], str], dict[str, dict[str, Any]]]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steady(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what depends on time (the digest of a line does too) or on the process's own resident set."""
    timed = ("seconds", "check")
    return [
        {key: value for key, value in row.items() if key not in timed}
        for row in rows
        if not row["metric"].startswith("latency") and not row["metric"].endswith("_peak")
    ]


def told(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What --junitxml is to say of a row."""
    names = "value unit verdict verdict_reference verdict_baseline device environment".split()
    interval = [("interval", str(tuple(row["interval"])))] if row["interval"] else []
    return sorted([*interval, *((name, str(row[name])) for name in names if row[name] not in (None, ""))])


def properties(path: Path) -> list[list[tuple[str, str]]]:
    cases = ElementTree.parse(path).iter("testcase")
    return sorted(sorted((one.attrib["name"], one.attrib["value"]) for one in case.iter("property")) for case in cases)


def test_a_first_run_is_unrecorded_and_two_workers_give_the_same_report(project: Project, by_metric: Pick) -> None:
    wanted = ("--methods", "absmax-int8,nf4", "--metrics", "perplexity,memory,latency.decode")
    result = project.run(*wanted, "-n", "0", "--report-dir", "one", "-v")
    assert result.ret == 0
    rows, folder = project.rows("one"), project.path / "one"
    assert {row["method"] for row in rows} == {"fp32", "absmax-int8", "nf4"}  # the reference is always planned
    assert {row["verdict"] for row in rows if row["metric"] != "latency.decode"} <= {"unrecorded", "within bound"}
    nf4 = by_metric(rows, "nf4")
    assert nf4["perplexity.delta"]["value"] > 0
    assert nf4["memory.storage"]["value"] < by_metric(rows, "fp32")["memory.storage"]["value"] / 2
    assert nf4["memory.storage"]["detail"]["predicted"] == nf4["memory.storage"]["value"]
    assert nf4["perplexity"]["token_hash"] == by_metric(rows, "fp32")["perplexity"]["token_hash"]
    assert (folder / "nll" / f"{nf4['perplexity']['nll']}.npz").is_file()
    assert set(json.loads((folder / "environments.json").read_text())) == {row["environment"] for row in rows}
    names = {path.name for path in folder.iterdir()}
    assert {"report.md", "measurements.jsonl", "environments.json", "plan.json", "nll"} <= names
    assert "nf4" in project.report("one")
    assert "| `fp32` (reference)" in project.report("one")
    result.stdout.fnmatch_lines(
        ["*PASSED * ppl, run as chunk:256 (unrecorded)*", f"{len(rows)} planned, {len(rows)} ran, 0 missing"]
    )
    assert not (project.path / "baselines").exists()  # nothing is written without a regeneration flag

    assert project.run(*wanted, "-n", "2", "--report-dir", "two", "--junitxml", "two.xml").ret == 0
    assert steady(project.rows("one")) == steady(project.rows("two"))
    assert project.identities("one") == project.identities("two") != {}
    assert len(project.rows("one")) == len(project.rows("two"))
    assert properties(project.path / "two.xml") == sorted(map(told, project.rows("two")))
    threads = {row["detail"].get("threads") for row in project.rows("two") if row["metric"] == "latency.decode"}
    assert threads == {row["detail"].get("threads") for row in project.rows("one") if row["metric"] == "latency.decode"}


def test_one_group_going_down_leaves_the_rest_standing(
    project: Project, by_metric: Pick, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(project.path / "summary.md"))
    result = project.run("--methods", "segfault,killed,oom,bug,lazy,nf4", "--metrics", "memory.storage")
    assert result.ret == 1
    rows = project.rows()
    reasons = {row["method"]: row["reason"] for row in rows if row["value"] is None}
    assert set(reasons) == {"segfault", "killed", "oom", "bug", "lazy"}
    assert re.search(r"segmentation fault.*needs [\d,]+ MiB by prediction", reasons["segfault"])
    assert re.search(r"SIGKILL: out of memory\?.*by prediction", reasons["killed"])
    assert re.search(r"out of memory: asked for 99 TiB; it needs .* by prediction", reasons["oom"])
    assert "KeyError" in reasons["bug"]
    assert "c_attn" in reasons["lazy"]
    assert by_metric(rows, "nf4")["memory.storage"]["value"] > 0
    result.stdout.fnmatch_lines(["*KeyError: 'a bug'*", "7 planned, 2 ran, 5 missing"])
    assert "segmentation fault" in project.report()
    case = "tiny-gpt2/lazy/memory.storage/cpu"
    result.stdout.fnmatch_lines([f"::error title={case}%3A missing::*c_attn*%0Ameasure again: pytest *{case}"])
    assert result.stdout.str().count("\n::error") == 5
    assert (project.path / "summary.md").read_text().startswith("# Quantization report\n\n**Harm: 5 missing.**")


def test_a_non_finite_reference_makes_its_dependents_unusable(project: Project, by_metric: Pick) -> None:
    assert project.run("--methods", "nf4", "--reference", "poison", "--metrics", "perplexity").ret == 1
    row = by_metric(project.rows(), "nf4")["perplexity.delta"]
    assert row["verdict"] == "unusable"
    assert "reference" in row["reason"]
    poisoned = by_metric(project.rows(), "poison")["perplexity"]
    assert poisoned["verdict"] == "out of bound"
    assert "non-finite" in poisoned["reason"]


def test_gpu_cases_without_a_card_are_missing_where_that_is_allowed(project: Project) -> None:
    named = ("-m", "gpu", "--models", "gpt2,olmo-1b", "--methods", "nf4", "--datasets", "wikitext-2")
    result = project.run(*named, "--allow-missing")
    assert result.ret == 0
    rows = project.rows()
    assert {row["model"] for row in rows} == {"gpt2", "olmo-1b"}
    assert {row["reason"] for row in rows} == {"no CUDA device"}
    assert {row["verdict"] for row in rows} == {"missing"}
    result.stdout.fnmatch_lines([f"0 of {len(rows)} gpu cases ran"])


def test_marks_select_without_xdist_too(project: Project) -> None:
    result = project.run("-p", "no:xdist", "-m", "perplexity and not gpu", "--methods", "nf4")
    assert result.ret == 0
    assert {row["metric"] for row in project.rows()} == {"perplexity", "perplexity.delta"}
    assert {row["device"] for row in project.rows()} == {"cpu"}


def test_deselected_is_not_missing_and_not_reached_is(project: Project) -> None:
    result = project.run("-x", "--methods", "oom,nf4", "--metrics", "memory.storage,memory.footprint", "-k", "storage")
    assert result.ret == 1
    rows = {row["method"]: row for row in project.rows()}
    assert set(rows) == {"fp32", "oom", "nf4"}
    assert {row["metric"] for row in rows.values()} == {"memory.storage"}
    assert rows["nf4"]["reason"] == "not reached: the session stopped before it"
    result.stdout.fnmatch_lines(["3 planned, 1 ran, 2 missing"])


def test_ctrl_c_keeps_what_was_measured(project: Project) -> None:
    command = [sys.executable, "-m", "pytest", "-v", "--models", "tiny-gpt2", "--datasets", "synthetic"]
    command += ["--methods", "nf4,fp4,linear-int4,absmax-int8", "--metrics", "all", "--repetitions", "50"]
    process = subprocess.Popen(
        command,
        cwd=project.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts behind `&` ignores it
    )
    path = project.path / "harness-report" / "measurements.jsonl"
    deadline = time.monotonic() + 120
    while not (path.is_file() and path.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    values = [row["value"] is not None for row in project.rows()]
    assert values[:2] == [True, True]
    assert not all(values)
    assert "not reached" in project.report()


def test_ctrl_c_between_two_lines_ends_as_any_other(project: Project) -> None:
    """An instruction without a line, as CPython has them: pytest counts from the line's number."""
    stop = 'exec(compile("raise KeyboardInterrupt", "nowhere", "exec").replace(co_linetable=b""))'
    project.write("conftest.py", f"def pytest_runtest_call(item):\n    if 'nf4' in item.name:\n        {stop}\n")
    result = project.run("--methods", "nf4", "--metrics", "memory.storage")
    assert result.ret == pytest.ExitCode.INTERRUPTED, result.stdout.str()
    assert [row["value"] is not None for row in project.rows()] == [True, False]
    result.stdout.fnmatch_lines(["*KeyboardInterrupt*"])


def test_resume_repeats_nothing_that_is_unchanged(project: Project) -> None:
    wanted = ("--methods", "nf4", "--metrics", "perplexity,memory.storage")
    assert project.run(*wanted).ret == 0
    before = {(row["method"], row["metric"]): row for row in project.rows()}
    assert project.run(*wanted, "--resume").ret == 0
    assert {(row["method"], row["metric"]): row for row in project.rows()} == before  # 'seconds' and all
    assert project.run(*wanted, "--resume", "--max-tokens", "512").ret == 0
    after = {(row["method"], row["metric"]): row for row in project.rows()}
    assert after["nf4", "perplexity"]["token_hash"] != before["nf4", "perplexity"]["token_hash"]
    assert after["nf4", "memory.storage"] == before["nf4", "memory.storage"]

    kept = files(project.path / "harness-report")
    for how in ((), ("--resume",), ("-n", "1")):  # what measures nothing touches nothing
        result = project.run("--methods", "nf4", "--device", "cuda", "--allow-missing", *how)
        assert result.ret == 0
        result.stdout.fnmatch_lines(["missing *: no CUDA device", "nothing was measured: * stays as it was"])
        assert files(project.path / "harness-report") == kept


@pytest.mark.parametrize("workers", ["0", "2"])
def test_collecting_the_whole_matrix_imports_no_torch(project: Project, workers: str) -> None:
    project.write(
        "conftest.py",
        "import sys\ndef pytest_unconfigure():\n    print('TORCH', 'torch' in sys.modules)\n",
    )
    result = project.run("--collect-only", "-q", "-s", "--metrics", "all", "-n", workers)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["TORCH False"])
    result.stdout.fnmatch_lines(["*tiny-gpt2/bnb-nf4-dq/*"])
    assert not (project.path / "harness-report").exists()


def test_shards_merged_equal_one_run(project: Project) -> None:
    wanted = ("--methods", "absmax-int8,nf4", "--metrics", "perplexity,memory", "-k", "not footprint")
    assert project.run(*wanted, "--report-dir", "merged").ret == 0
    (project.path / "merged").rename(project.path / "one")
    parts = [f"s{index}" for index in range(1, 6)]
    for index, part in enumerate(parts, 1):
        workers = "2" if index == 2 else "0"
        result = project.run(*wanted, "--shard", f"{index}/5", "--report-dir", part, "-n", workers)
        assert result.ret == 0
    command = [sys.executable, "-m", "harness", "merge", *parts, "-o", "merged"]
    done = subprocess.run(command, cwd=project.path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert steady(project.rows("merged")) == steady(project.rows("one"))
    assert project.identities("merged") == project.identities("one")

    def lines(name: str) -> list[str]:
        text = (project.path / name / "measurements.jsonl").read_text()
        found = (re.sub(r'"(seconds|check)": "?[\da-f.]+', r'"\1": 0', line) for line in text.splitlines())
        return [line for line in found if '_peak"' not in line]  # pages of a process, as different as times

    assert lines("merged") == lines("one")

    def timeless(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("    pytest ")]  # -n differs

    assert timeless(project.report("merged")) == timeless(project.report("one"))
    counts = [len(project.rows(part)) for part in parts]
    assert sum(counts) == len(project.rows("one"))


def test_more_shards_than_pieces_leaves_some_with_nothing_to_do(project: Project) -> None:
    wanted = ("--methods", "fp32", "--metrics", "memory.storage", "--report-dir", "s")
    assert project.run(*wanted, "--shard", "2/2").ret == 0
    assert json.loads((project.path / "s" / "shard.json").read_text())["index"] == 2
