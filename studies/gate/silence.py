"""Part 4 of the gate's bench: changes that must raise no alarm, over the whole small matrix."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml

from harness.core.files import append_line
from harness.core.options import Declared
from harness.core.records import Case, Verdict
from harness.core.specification import parse
from harness.core.text import plural
from harness.inputs.models import checkpoints
from harness.inputs.texts import corpora
from harness.judge.rules import ALPHA
from harness.metrics.measuring import engine
from harness.report import markup
from harness.results import losses
from studies import pages
from studies.gate import small
from studies.gate.small import Bench, Outcome

REPEATS, MINUTES = 10, 240.0
PARTIAL = Path(__file__).parents[2] / "docs" / "studies" / "data" / "gate.partial.jsonl"
TOKENS, PROTOCOL = 1024, "chunk:128"  # 8 windows: the fewest that decide anything
THREADS = 1  # recorded with; tiny products gain nothing from more
Told = dict[str, Any]  # arguments of the session
Apply = Callable[[Bench, random.Random], contextlib.AbstractContextManager[Told]]


@dataclass(frozen=True)
class Change:
    """One harmless change; `loads` where it can touch how a model is loaded, which is then loaded anew each time."""

    name: str
    apply: Apply
    loads: bool = False
    workers: int = 0  # run by pytest with so many pytest-xdist workers, in child processes; 0: in this process


def asked(**told: Any) -> Apply:
    """Other arguments of the session."""

    @contextlib.contextmanager
    def apply(bench: Bench, chance: random.Random) -> Iterator[Told]:
        yield told

    return apply


def patched(target: Any, name: str, make: Callable[[Any, random.Random], Any]) -> Apply:
    """Something of the harness or torch replaced by what must give the same."""

    @contextlib.contextmanager
    def apply(bench: Bench, chance: random.Random) -> Iterator[Told]:
        with patch.object(target, name, make(getattr(target, name), chance)):
            yield {}

    return apply


def threads(count: int) -> Apply:
    """Another number of compute threads."""

    @contextlib.contextmanager
    def apply(bench: Bench, chance: random.Random) -> Iterator[Told]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield {}
        finally:
            torch.set_num_threads(before)

    return apply


def ordered(order: Callable[[list[Case], random.Random], Sequence[Case]]) -> Apply:
    """Cases in another order."""

    @contextlib.contextmanager
    def apply(bench: Bench, chance: random.Random) -> Iterator[Told]:
        yield {"order": lambda cases: order(list(cases), chance)}

    return apply


def by_group(cases: list[Case], chance: random.Random) -> list[Case]:
    """Groups in another order, cases within them too."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    shuffled = chance.sample(list(groups), len(groups))
    return [case for name in shuffled for case in chance.sample(groups[name], len(groups[name]))]


def windows_in(order: Callable[[list[int], random.Random], list[int]], at_once: bool) -> Apply:
    """Windows scored in another order, together or one by one, and put back."""

    def make(score: Any, chance: random.Random) -> Any:
        def scored(model: Any, windows: Any, **more: Any) -> Any:
            places = order(list(range(len(windows))), chance)
            ends = np.cumsum([window.scored for window in windows])
            found = np.empty(int(ends[-1]), dtype=np.float32)
            chosen = [places] if at_once else [[place] for place in places]
            for part in chosen:
                nll, at = score(model, [windows[place] for place in part], **more), 0
                for place in part:
                    size = windows[place].scored
                    found[ends[place] - size : ends[place]] = nll[at : at + size]
                    at += size
            return found

        return scored

    return patched(engine, "score", make)


@contextlib.contextmanager
def stored_wider(bench: Bench, chance: random.Random) -> Iterator[Told]:
    """The cache of losses kept in float64."""

    def save(folder: Path, nll: Any) -> str:
        sha = losses.name_of(nll)
        np.savez(folder / f"{sha}.npz", nll=nll.astype(np.float64))
        return sha

    with patch.object(losses, "save", save):
        yield {}


def elsewhere(kind: str) -> Apply:
    """Weights (or text) copied to another place under another file name, declared under the same name."""

    @contextlib.contextmanager
    def apply(bench: Bench, chance: random.Random) -> Iterator[Told]:
        declared = bench.options.declared
        home = bench.folder / f"moved {chance.randrange(10**9)}"
        home.mkdir()
        if kind == "text":
            shutil.copy(bench.folder / "words.txt", home / "other name.txt")
            moved = dataclasses.replace(declared, datasets={"words": f"text:{home.name}/other name.txt"})
        else:
            for name in declared.models:
                shutil.copytree(bench.folder / name, home / f"{name}-again")
                if kind == "rewritten":
                    rewrite(home / f"{name}-again")
            models = {name: f"path:{home.name}/{name}-again" for name in declared.models}
            moved = dataclasses.replace(declared, models=models)
        yield {"declared": moved}
        shutil.rmtree(home)

    return apply


def rewrite(folder: Path) -> None:
    """config.json and tokenizer.json as another release would write them: keys sorted, no indentation."""
    for name in ("config.json", "tokenizer.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=name == "config.json"))


@contextlib.contextmanager
def reformatted(bench: Bench, chance: random.Random) -> Iterator[Told]:
    """Baseline files written by another YAML writer: keys sorted, flow style."""
    kept = {path: path.read_text() for path in bench.options.baselines.glob("*/*.yaml")}
    for path, text in kept.items():
        path.write_text(yaml.safe_dump(yaml.safe_load(text), sort_keys=True, default_flow_style=True))
    yield {}
    for path, text in kept.items():
        path.write_text(text)


@contextlib.contextmanager
def copied_baselines(bench: Bench, chance: random.Random) -> Iterator[Told]:
    """The baselines folder somewhere else."""
    place = bench.folder / "copied baselines"
    shutil.copytree(bench.options.baselines, place)
    yield {"baselines": place}
    shutil.rmtree(place)


@contextlib.contextmanager
def another_folder(bench: Bench, chance: random.Random) -> Iterator[Told]:
    """Another working directory."""
    before = Path.cwd()
    os.chdir(bench.folder)
    yield {}
    os.chdir(before)


def variables(**values: str) -> Apply:
    """Other environment variables."""

    @contextlib.contextmanager
    def apply(bench: Bench, chance: random.Random) -> Iterator[Told]:
        with patch.dict(os.environ, values):
            yield {}

    return apply


@contextlib.contextmanager
def seeded(bench: Bench, chance: random.Random) -> Iterator[Told]:
    """Other states of every random generator."""
    torch.manual_seed(chance.randrange(10**9))
    np.random.seed(chance.randrange(10**9))
    random.seed(chance.random())
    yield {}


def part(**told: Any) -> Apply:
    """A session of part of the matrix."""
    return asked(**told)


@contextlib.contextmanager
def without_onednn(bench: Bench, chance: random.Random) -> Iterator[Told]:
    """Products by another library: the same sums in another order."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield {}


SOME = ("nf4", "bnb-int8", "absmax-int8", "bf16")
CHANGES = (
    Change("repeated, models loaded anew", asked(), loads=True),
    Change("repeated, models kept", asked()),
    Change("batch of 2", asked(batch_size=2)),
    Change("batch of 3", asked(batch_size=3)),
    Change("batch of 8", asked(batch_size=8)),
    Change("cases in reverse", ordered(lambda cases, chance: cases[::-1])),
    Change("cases shuffled", ordered(lambda cases, chance: chance.sample(cases, len(cases)))),
    Change("groups shuffled", ordered(by_group)),
    Change("2 threads", threads(2)),
    Change("3 threads", threads(3)),
    Change("4 threads", threads(4)),
    Change("pytest with 2 workers", asked(), loads=True, workers=2),
    Change("pytest with 3 workers", asked(), loads=True, workers=3),
    Change("windows in reverse", windows_in(lambda places, chance: places[::-1], True)),
    Change("windows shuffled", windows_in(lambda places, chance: chance.sample(places, len(places)), True)),
    Change("a window at a time", windows_in(lambda places, chance: places, False)),
    Change("losses cached in float64", stored_wider),
    Change("logits in slices of 4 KiB", patched(engine, "LOGITS_BYTES", lambda value, chance: 4096)),
    Change("products without oneDNN", without_onednn),
    Change("eager attention", patched(checkpoints, "ATTENTION", lambda value, chance: "eager"), loads=True),
    Change("weights in a renamed folder", elsewhere("weights"), loads=True),
    Change("config and tokenizer rewritten", elsewhere("rewritten"), loads=True),
    Change("equal text in another file", elsewhere("text")),
    Change("baselines reformatted", reformatted),
    Change("baselines in another folder", copied_baselines),
    Change("another working directory", another_folder),
    Change("OMP_WAIT_POLICY and tokenizer threads", variables(OMP_WAIT_POLICY="active", TOKENIZERS_PARALLELISM="true")),
    Change("another locale and time zone", variables(LC_ALL="tr_TR.UTF-8", TZ="Pacific/Chatham")),
    Change("other random states", seeded),
    Change("perplexity alone", part(metrics=("perplexity",))),
    Change("divergence first", part(metrics=("divergence.rms_dp", "divergence.kl", "perplexity", "memory"))),
    Change("some methods, in another order", part(methods=tuple(map(parse, SOME)))),
)


@contextlib.contextmanager
def recorded(**changes: Any) -> Iterator[Bench]:
    """The small matrix over weights and text in files of their own, recorded."""
    with small.bench() as bench:
        own = laid_out(bench.folder, **changes)
        own.record()
        yield own


def laid_out(folder: Path, **changes: Any) -> Bench:
    """A bench in a folder that holds its weights and text, nothing recorded yet."""
    names = {"small-gpt2": "tiny-gpt2", "small-olmo": "tiny-olmo"}
    if not (folder / "words.txt").exists():
        for name, source in names.items():
            made = checkpoints.materialise(parse(source), Declared(folder))
            shutil.copytree(made.directory, folder / name, ignore=shutil.ignore_patterns("harness.json"))
        text = corpora.read(parse("synthetic"), Declared(folder)).joined("chunk").texts
        (folder / "words.txt").write_text("\n\n".join(text))
    declared = Declared(folder, {name: f"path:{name}" for name in names}, {"words": "text:words.txt"})
    told = {"models": tuple(names), "datasets": ("words",), "protocols": (PROTOCOL,), "max_tokens": TOKENS}
    return Bench(folder, small.options(folder, declared=declared, **{**told, **changes}))


def measure(
    repeats: int = REPEATS, names: Sequence[str] = (), partial: Path = PARTIAL, minutes: float = MINUTES
) -> dict[str, Any]:
    """Every change, `repeats` times, by as many processes as there are processors.

    Each change is appended to `partial` as it ends, with its world: called again after an interruption, those that
    lie there are not measured again. After so many minutes no other starts; what is not measured is counted as left.
    """
    chosen = [change.name for change in CHANGES if not names or change.name in names]
    found = before(partial, repeats)
    dearest = sorted(CHANGES, key=lambda change: not change.loads)
    left = [change.name for change in dearest if change.name in chosen and change.name not in found]
    deadline = time.time() + 60 * minutes
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        for future in as_completed([pool.submit(measured, repeats, name, deadline) for name in left]):
            if entry := future.result():
                append_line(partial, json.dumps(entry))
                found[entry["change"]] = entry
    entries = [found[name] for name in chosen if name in found]
    return {**summary(entries), "left": len(chosen) - len(entries)}


def before(partial: Path, repeats: int) -> dict[str, dict[str, Any]]:
    """The changes of an interrupted run."""
    lines = map(json.loads, partial.read_text(encoding="utf-8").splitlines()) if partial.is_file() else ()
    found = {entry["change"]: entry for entry in lines if entry["sessions"] == repeats}
    if found:
        dates = sorted({entry["world"]["date"] for entry in found.values()})
        told = f"silence: {len(found)} changes of {', '.join(dates)} are in {partial}: remove it to measure them again"
        print(told, file=sys.stderr)
    return found


@functools.cache
def matrix() -> tuple[Bench, dict[str, Any], int, int]:
    """This process's small matrix, recorded: the bench, what is kept loaded, its tests and cases."""
    gc.freeze()  # what is imported is not searched for garbage at every load
    torch.set_num_threads(THREADS)
    stack = contextlib.ExitStack()
    Finalize(None, stack.close, exitpriority=1)
    bench, kept = stack.enter_context(recorded()), dict[str, Any]()
    return bench, kept, bench.session(kept=kept).tests, cases(bench)


def measured(repeats: int, name: str, deadline: float) -> dict[str, Any] | None:
    """One change, in this process; None after the deadline (seconds of `time.time`)."""
    if time.time() > deadline:
        return None
    bench, kept, tests, planned = matrix()
    start = time.monotonic()
    change = next(change for change in CHANGES if change.name == name)
    entry = tried(bench, change, repeats, kept)
    return {**entry, "tests": tests, "cases": planned, "world": pages.world(time.monotonic() - start)}


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results as kept."""
    return {
        "changes": list(found),
        "tests": max((entry["tests"] for entry in found), default=0),
        "cases": max((entry["cases"] for entry in found), default=0),
        "tokens": TOKENS,
        "sessions": sum(entry["sessions"] for entry in found),
        "alarmed": sum(entry["alarmed"] for entry in found),
    }


def tried(bench: Bench, change: Change, repeats: int, kept: dict[str, Any] | None) -> dict[str, Any]:
    """One change, `repeats` times: sessions that alarmed, verdicts, and the largest change of a loss."""
    chance, words, alarms = random.Random(change.name), dict[str, int](), list[str]()
    largest: dict[str, float] = {}
    sessions = 0
    for _ in range(repeats):
        with change.apply(bench, chance) as told:
            if change.workers:
                outcome = bench.workers(change.workers)
            else:
                outcome = bench.session(kept=None if change.loads else kept, **told)
        sessions += bool(outcome.alarms)
        alarms += [f"{row.case.id}: {row.verdict}: {row.reason}" for row in outcome.alarms]
        count(outcome, words, largest)
    print(f"silence: {change.name}: {sessions} of {repeats} alarmed, {words} {alarms[:3]}", file=sys.stderr)
    entry = {"change": change.name, "sessions": repeats, "alarmed": sessions, "verdicts": words, "largest": largest}
    return entry | {"alarms": alarms[:5], "loads": change.loads or kept is None}


def cases(bench: Bench) -> int:
    """How many cases the whole matrix has."""
    from harness.run import plan as planning

    return len(planning.plan(bench.options, False))


def count(outcome: Outcome, words: dict[str, int], largest: dict[str, float]) -> None:
    """Add a session's verdicts, and the largest change of each metric, to what was counted."""
    for row in outcome.rows:
        words[str(row.verdict)] = words.get(str(row.verdict), 0) + 1
        told = row.detail.get("change")
        if isinstance(told, Mapping) and row.case.family == "perplexity":
            largest["perplexity"] = max(largest.get("perplexity", 0.0), abs(told["value"]))


def worlds(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """When and where each change was measured, as far as it was kept."""
    return [entry["world"] for entry in found["changes"] if "world" in entry]


def render(found: Mapping[str, Any]) -> str:
    """The section."""
    share, spread = small.share_of(found["alarmed"], found["sessions"])
    rate = ALPHA
    quiet = {str(Verdict.SAME), str(Verdict.WITHIN_BOUND), str(Verdict.WITHIN_NOISE)}
    rows = [
        [
            entry["change"],
            f"{entry['alarmed']} of {entry['sessions']}",
            f"{entry['verdicts'].get('same', 0):,}",
            f"{entry['verdicts'].get('within noise', 0):,}",
            f"{sum(number for word, number in entry['verdicts'].items() if word not in quiet):,}",
            f"{entry['largest'].get('perplexity', 0.0):.1e}",
            "yes" if entry["loads"] else "no",
        ]
        for entry in found["changes"]
    ]
    headers = ["harmless change", "sessions alarmed", "same", "within noise", "any other verdict"]
    headers += ["largest change of NLL, nat", "models loaded anew"]
    seen = "".join(f"\n- {entry['change']}: {line}" for entry in found["changes"] for line in entry["alarms"])
    verdict = "within" if share <= rate else "**above**"
    days = Counter(f"on {made['date']} on {pages.machine(made)}" for made in worlds(found))
    told = "; ".join(f"{plural(count, 'change')} {day}" for day, count in sorted(days.items()))
    return (
        f"{len(found['changes'])} harmless changes over the whole small matrix, the sessions of each beside it "
        f"({found['cases']} cases: two tiny models, fourteen methods, perplexity, exact memory and divergence over "
        f"{found['tokens']:,} tokens; {found['tests']} statistical tests a session), as CI runs it "
        "(`--require-baselines`). "
        f"Alarmed: {found['alarmed']} of {found['sessions']:,} sessions, {100 * share:.1f}% ± {100 * spread:.1f}; "
        f"stated are at most {100 * rate:.0f}%: {verdict} the rate."
        + (f" Not measured yet: {plural(found['left'], 'change')}." if found.get("left") else "")
        + (f" Measured: {told}." if told else "") + "\n\n" + markup.table(headers, rows, words=(0, -1))
        + (f"\n\nAlarms:\n{seen}" if seen else "")
    )  # fmt: skip
