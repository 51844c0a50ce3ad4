"""Sessions under other kernels, judged by the harness's own rules: do they stay silent, and what do they still see?

The losses are those of `noise`. A *run* is a session of a model's methods on one slice of text under a changed kernel,
held against a record of the usual one: perplexity, its delta and `divergence.rms_dp` of every method. A run whose every
bit equals its record is not counted: it could not alarm. From the embedded model's losses longer and shorter texts are
drawn too, whole windows with replacement, so that neighbours stay neighbours: tokens move as they were seen to, less
the kernel's own mean, and all of a run's tokens by a shift that is drawn from what `[[noise]]` records.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from harness import judge
from harness.core import catalog, stats
from harness.core.environment import Environment
from harness.core.records import Case, Row, Verdict
from harness.core.specification import parse
from harness.judge import bounds, rules
from harness.judge.baselines import Recorded
from harness.judge.rules import ALPHA
from harness.methods.quantizing import arguments
from harness.report import markup
from studies.gate import noise, small
from studies.gate.noise import EMBEDDED, TINY, USUAL, Losses, Series

SEED = 20_251_122  # any number would do
WIDTH = 255  # scored tokens of a drawn window: chunk:256
SIZES = (4, 8, 148)  # windows of a drawn text; 148 are those of the embedded text
RUNS = 2000  # drawn sessions
SHIFTS = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)  # nats, added to every token of one method
POWER_RUNS = 200
ALARMS = frozenset({Verdict.WORSE, Verdict.BETTER, Verdict.UNUSABLE, Verdict.MISSING, Verdict.INPUT_CHANGED})
WORLD = Environment(device="cpu", torch="2.13.0", instructions="avx2", machine="a" * 16)
Chance = np.random.Generator


@dataclass(frozen=True)
class Pair:
    """One method's losses on the same tokens, recorded and now."""

    then: Losses
    now: Losses


Session = Mapping[str, Pair]  # by method; the reference among them


@functools.cache
def method_id(method: str) -> str:
    """A method with every argument written out, as rows have it."""
    known = catalog.methods()[method]
    return arguments.method_id(known, arguments.resolve(parse(method), known, "cpu"), 1)


def named(losses: Losses, store: dict[str, Losses]) -> str:
    """The name under which the judge finds losses; equal ones share it."""
    name = hashlib.sha256(losses.tobytes()).hexdigest()
    store[name] = losses
    return name


def rows(
    model: str, losses: Mapping[str, Losses], counts: Sequence[int], store: dict[str, Losses], reference: str = "fp32"
) -> list[Row]:
    """Perplexity, delta and rms_dp of every method, as a session measures them; windows of so many scored tokens."""
    base, names = losses[reference], {method: named(nll, store) for method, nll in losses.items()}
    found = []
    for method, nll in losses.items():
        figures = {"perplexity": float(np.exp(nll.astype(np.float64).mean()))}
        if method != reference:
            figures["perplexity.delta"] = float((nll.astype(np.float64) - base).mean())
            figures["divergence.rms_dp"] = noise.rms_dp(nll, base)
        for metric, value in figures.items():
            case = Case(model, method, "text", f"chunk:{WIDTH + 1}", metric, "cpu")
            detail: dict[str, Any] = {"window_counts": list(counts), "tokens": len(nll), "scored": len(nll)}
            if method != reference:
                detail["reference_nll"] = names[reference]
            found.append(
                Row.of(
                    case,
                    value=value,
                    unit=catalog.member_of(case).unit,
                    count=len(counts) if metric == "perplexity.delta" else len(nll),
                    revision="weights",
                    method_id=method_id(method),
                    protocol_id="protocol",
                    token_hash="tokens",
                    nll=names[method],
                    detail=detail,
                )
            )
    return found


def judged(model: str, session: Session, counts: Sequence[int]) -> list[Row]:
    """The session's rows with their verdicts against the record."""
    store: dict[str, Losses] = {}
    sides = [{method: getattr(pair, side) for method, pair in session.items()} for side in ("now", "then")]
    now, then = (rows(model, side, counts, store) for side in sides)
    rule, tests = tolerated(), rules.tests([row.case for row in now], tolerated(), stop_early=False)
    found = []
    for row, before in zip(now, then, strict=True):
        recorded = replace(Recorded.of_row(before, WORLD, "2026-01-01T00:00:00Z"), file=f"{model}/{row.method}.yaml")
        told: Any = {"bounds": rule, "recorded": recorded, "environment": WORLD, "nll": store.get, "tests": tests}
        found.append(judge.judge(row, catalog.member_of(row.case), **told))
    return rules.settle(found, tests)


@functools.cache
def tolerated() -> bounds.Bounds:
    """The package's rules."""
    return bounds.packaged()


def alarms(found: Sequence[Row]) -> list[Row]:
    """Rows that the record says moved; a bound against the reference is another matter, the same in both runs."""
    return [row for row in found if row.verdict_baseline in ALARMS]


# runs that were measured


def measured_runs(series: Series, keep: Path) -> list[tuple[str, str, Session]]:
    """(kernel, slice, session) of every slice that both kernels have with the reference."""
    found = list[tuple[str, str, Session]]()
    for kernel in series.kernels:
        sides = {
            method: tuple(noise.losses_of(keep, series, name, method) for name in (USUAL, kernel))
            for method in series.methods
        }
        for name in sides["fp32"][1]:
            session = {
                method: Pair(then[name], now[name])
                for method, (then, now) in sides.items()
                if name in then and name in now
            }
            if "fp32" in session:
                found.append((kernel, name, session))
    return found


def equal(session: Session) -> bool:
    """Whether no bit differs from the record."""
    return all(np.array_equal(pair.then, pair.now) for pair in session.values())


def pooled(series: Sequence[Series], keep: Path) -> dict[str, Any]:
    """How many measured runs alarm, by model and kernel."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for one in series:
        for kernel, name, session in measured_runs(one, keep):
            line = lines.setdefault(
                (one.model, kernel),
                {"model": one.model, "kernel": kernel, "runs": 0, "equal": 0, "alarmed": 0, "alarms": []},
            )
            if equal(session):
                line["equal"] += 1
                continue
            seen = alarms(judged(one.model, session, noise.counts_of(one, session["fp32"].then)))
            line["runs"] += 1
            line["alarmed"] += bool(seen)
            line["alarms"] += [
                f"{name}: {row.method} {row.metric}: {row.verdict_baseline}: {row.reason}" for row in seen
            ]
    found = list(lines.values())
    for line in found:
        line["alarms"] = line["alarms"][:3]
    return {"lines": found, **rate(sum(line["alarmed"] for line in found), sum(line["runs"] for line in found))}


def rate(alarmed: int, runs: int) -> dict[str, Any]:
    """So many of so many, with the upper 95% limit."""
    return {"runs": runs, "alarmed": alarmed, "upper": small.upper_limit(alarmed, runs) if runs else 1.0}


# runs that are drawn


@dataclass(frozen=True)
class Population:
    """What drawn texts are made of.

    then: by kernel and method, (slices, tokens), recorded. change: the same, what the kernel moves, of mean 0 over all.
    usual: by method, (slices, tokens), of every slice that the usual kernel has under all methods. shift: by method,
    the standard deviation over runs of what moves all tokens; nats.
    """

    then: Mapping[str, Mapping[str, Losses]]
    change: Mapping[str, Mapping[str, NDArray[Any]]]
    usual: Mapping[str, Losses]
    shift: Mapping[str, float]

    def draw(self, chance: Chance, windows: int) -> Session:
        """A text of so many windows under one of the kernels."""
        kernel = str(chance.choice(list(self.change)))
        count, tokens = next(iter(self.then[kernel].values())).shape
        starts = chance.integers(tokens - WIDTH + 1, size=windows)
        places = list(zip(chance.integers(count, size=windows), starts, strict=True))

        def cut(values: NDArray[Any]) -> NDArray[Any]:
            return np.concatenate([values[piece, start : start + WIDTH] for piece, start in places])

        session = {}
        for method, losses in self.then[kernel].items():
            moved = cut(self.change[kernel][method]) + chance.normal(0, self.shift[method])
            session[method] = Pair(cut(losses), (cut(losses) + moved).astype(np.float32))
        return session


def population(series: Series, keep: Path) -> Population:
    """Of the methods that every kernel has, the slices that each has under all of them; ValueError without any."""
    kernels = (USUAL, *series.kernels)
    read = {
        (kernel, method): noise.losses_of(keep, series, kernel, method)
        for kernel, method in itertools.product(kernels, series.methods)
    }
    methods = [method for method in series.methods if all(read[kernel, method] for kernel in kernels)]
    if not methods:
        raise ValueError(f"{series.label} is not measured under every kernel: python -m studies.gate.noise")

    def stacked(kernel: str, of: str) -> dict[str, Losses]:
        sides = [read[side, method] for side, method in itertools.product((USUAL, kernel), methods)]
        names = sorted(set.intersection(*map(set, sides)))
        return {method: np.stack([read[of, method][name] for name in names]) for method in methods}

    then = {kernel: stacked(kernel, USUAL) for kernel in series.kernels}
    change: dict[str, dict[str, NDArray[np.float64]]] = {kernel: {} for kernel in series.kernels}
    for kernel in series.kernels:
        for method, losses in stacked(kernel, kernel).items():
            moved = losses.astype(np.float64) - then[kernel][method]
            change[kernel][method] = moved - moved.mean()
    shift = {method: recorded_shift(series.model, method) for method in methods}
    return Population(then, change, stacked(USUAL, USUAL), shift)


def recorded_shift(model: str, method: str) -> float:
    """What the package's rules record of a run's shift, nats."""
    case = Case(model, method, "text", f"chunk:{WIDTH + 1}", "perplexity", "cpu")
    return tolerated().noise(case, bounds.ran(case, method_id(method), WORLD))[1]


def drawn(known: Population, model: str, runs: int) -> list[dict[str, Any]]:
    """How many drawn sessions alarm, by the length of the text."""
    found = []
    for windows in SIZES:
        chance, alarmed, seen = np.random.default_rng(SEED), 0, list[str]()
        for _ in range(runs):
            called = alarms(judged(model, known.draw(chance, windows), [WIDTH] * windows))
            alarmed += bool(called)
            seen += [f"{row.method} {row.metric}: {row.verdict_baseline}: {row.reason}" for row in called]
        found.append({"windows": windows, **rate(alarmed, runs), "alarms": seen[:3]})
        print(f"kernels: {found[-1]}", file=sys.stderr)
    return found


def shifted(session: Session, method: str, by: float) -> Session:
    """The session with every loss of one method worse by so many nats."""
    pair = session[method]
    return {**session, method: Pair(pair.then, (pair.now + np.float32(by)).astype(np.float32))}


def power(known: Population, model: str, runs: int) -> list[dict[str, Any]]:
    """How often a true change of a method is called on top of a kernel's noise, by its size and the text's length."""
    found = []
    for method in known.shift:
        for windows in SIZES:
            line: dict[str, Any] = {"method": method, "windows": windows, "runs": runs, "seen": []}
            for by in SHIFTS:
                chance, seen = np.random.default_rng(SEED), 0
                for _ in range(runs):
                    session = shifted(known.draw(chance, windows), method, by)
                    called = judged(model, session, [WIDTH] * windows)
                    seen += any(row.method == method and row.verdict_baseline is Verdict.WORSE for row in called)
                line["seen"].append(seen / runs)
            found.append(line)
            print(f"kernels: power {line}", file=sys.stderr)
    return found


def coverage(known: Population, runs: int) -> list[dict[str, Any]]:
    """How often Student's t over windows holds a method's true loss against the reference, by the text's length."""
    found = []
    for method in (name for name in known.usual if name != "fp32"):
        change = known.usual[method].astype(np.float64) - known.usual["fp32"]  # (slices, tokens)
        sums = np.concatenate([np.zeros((len(change), 1)), change.cumsum(1)], axis=1)
        means = (sums[:, WIDTH:] - sums[:, :-WIDTH]) / WIDTH  # (slices, places of a window)
        true = float(means.mean())  # every place is drawn alike
        for windows in SIZES:
            chance = np.random.default_rng(SEED)
            held = 0
            for _ in range(runs):
                values = chance.choice(means.ravel(), size=windows)
                estimate = stats.weighted_mean(values, np.full(windows, float(WIDTH)))
                held += estimate.low <= true <= estimate.high
            found.append({"method": method, "windows": windows, "runs": runs, "held": held / runs})
    return found


def measure(keep: Path | None = None, runs: int = RUNS, power_runs: int = POWER_RUNS) -> dict[str, Any]:
    """Judge what `noise` has measured; nothing is measured here."""
    keep = keep or noise.home()
    known = population(EMBEDDED, keep)
    return {
        "tiny": pooled(TINY, keep),
        "embedded": pooled((EMBEDDED,), keep),
        "drawn": drawn(known, EMBEDDED.model, runs),
        "methods": list(known.shift),
        "slices": {kernel: len(next(iter(found.values()))) for kernel, found in known.then.items()},
        "power": power(known, EMBEDDED.model, power_runs),
        "coverage": coverage(known, runs),
    }


def share(entry: Mapping[str, Any]) -> str:
    """'0 of 100, at most 3.0%'."""
    return f"{entry['alarmed']} of {entry['runs']:,}, at most {100 * entry['upper']:.1f}%"


def render(found: Mapping[str, Any]) -> str:
    """The section."""
    drawn_, limit = found["drawn"], ALPHA
    pools = {
        "tiny models, measured": found["tiny"],
        "embedded model, measured": found["embedded"],
        **{f"embedded model, drawn: {entry['windows']} windows": entry for entry in drawn_},
    }
    held = [name for name, pool in pools.items() if pool["upper"] > limit]
    verdict = f"**above {100 * limit:.0f}%**: {', '.join(held)}" if held else f"at most {100 * limit:.0f}% in each pool"
    lines = [
        [f"`{line['model']}`", line["kernel"], f"{line['alarmed']} of {line['runs']}", f"{line['equal']}"]
        for pool in ("tiny", "embedded")
        for line in found[pool]["lines"]
    ]
    shifts = [f"+{shift:g}" for shift in SHIFTS]
    seen = [
        [f"`{line['method']}`", f"{line['windows']}", *(f"{100 * part:.0f}" for part in line["seen"])]
        for line in found["power"]
    ]
    covered = [
        [f"`{line['method']}`", f"{line['windows']}", f"{100 * line['held']:.1f}%"] for line in found["coverage"]
    ]
    told = "".join(
        f"\n- {pool}: {markup.escape(text)}" for pool, entry in pools.items() for text in
        [*entry.get("alarms", []), *(text for line in entry.get("lines", []) for text in line["alarms"])]
    )  # fmt: skip
    return "\n\n".join(
        (
            "Sessions under other kernels, each held against a record of the usual one by the harness's own rules "
            "(perplexity, delta and `divergence.rms_dp` of every method). A run whose every bit equals its record is "
            "not counted. An alarm is any row that is `worse`, `better` or undecided against its record. The upper "
            f"limit is Clopper and Pearson's, 95%, one-sided: {verdict}.",
            markup.table(
                ["pool", "runs alarmed, upper limit of the rate"],
                [[name, share(pool)] for name, pool in pools.items()],
                words=(0, 1),
            ),
            markup.table(["model", "kernel", "runs alarmed", "equal to the bit, not counted"], lines, words=(0, 1)),
            *([f"Alarms:\n{told}"] if told else []),
            f"**Power on the embedded model**: every loss of one method worse by so many nats on top of a drawn "
            f"kernel's noise; percent of {found['power'][0]['runs'] if found['power'] else 0} drawn sessions in which "
            "that method is called `worse`.",
            markup.table(["method", "windows", *shifts], seen, words=(0,)),
            "**Coverage on the embedded model**: how often Student's 95% interval over drawn windows holds a method's "
            "true loss against `fp32`. Below 8 windows it is shown and decides nothing.",
            markup.table(["method", "windows", "holds the truth"], covered, words=(0,)),
        )
    )
