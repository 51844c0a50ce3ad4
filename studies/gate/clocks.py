"""Part 6 of the gate's bench: latency verdicts over made-up sessions, by how noisy the machine is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from harness.core import stats
from harness.core.records import Verdict
from harness.core.text import NOTHING
from harness.metrics.measuring import timing
from harness.report import markup
from studies.gate.device_faults import judged

SEED = 20_251_122  # any number would do
BLOCKS = 10  # of the main job
TESTS = 28  # two latency members of fourteen methods
NOISES = (0.02, 0.1, 0.3)  # standard deviation of the logarithm of a repetition
SLOWER = (1.0, 1.1, 1.15, 1.25, 1.5)  # true change of the ratio to the reference; 1 is none, 1.1 is tolerated
STALL = 0.005  # share of repetitions that another process stalls
STALLED = 3.0  # times as long


def session(chance: np.random.Generator, noise: float, slower: float) -> dict[str, Any]:
    """One method timed against its reference: the detail that the metric keeps."""

    def seconds(scale: float) -> Any:
        stalls = np.where(chance.random(BLOCKS) < STALL, STALLED, 1.0)
        return scale * np.exp(chance.normal(0, noise, BLOCKS)) * stalls

    ours, theirs = seconds(1.5 * slower), seconds(1.0)
    ratio = stats.hodges_lehmann_ratio(ours, theirs)
    told = {"log_ratio": ratio.value, "log_ratio_low": ratio.low, "log_ratio_high": ratio.high}
    return {**told, "aa_floor": timing.aa_floor(theirs.tolist())}


def measure(runs: int = 200) -> dict[str, Any]:
    """How often a case is called worse, better or unusable, and how often a session of 28 quiet cases alarms."""
    rows = []
    for noise in NOISES:
        for slower in SLOWER:
            chance = np.random.default_rng(SEED)
            words: list[Verdict | None] = []
            for _ in range(runs):
                now, then = session(chance, noise, slower), session(chance, noise, 1.0)
                words.append(judged("latency.decode", 1.0, 1.0, now, then, tests=TESTS).verdict_baseline)
            entry = {"noise": noise, "slower": slower, "runs": runs}
            rows.append(
                entry | {str(word): words.count(word) for word in (Verdict.WORSE, Verdict.BETTER, Verdict.UNUSABLE)}
            )
        print(f"clocks: {rows[-1]}", file=sys.stderr)
    return {"rows": rows, "tests": TESTS, "blocks": BLOCKS}


def render(found: Mapping[str, Any]) -> str:
    """The section."""
    lines = []
    for row in found["rows"]:
        runs = row["runs"]
        alarm = 1 - (1 - (row["worse"] + row["better"]) / runs) ** found["tests"] if row["slower"] == 1 else None
        lines.append(
            [
                f"{100 * row['noise']:.0f}%",
                f"{100 * (row['slower'] - 1):+.0f}%",
                *(f"{100 * row[word] / runs:.1f}%" for word in ("worse", "better", "unusable")),
                NOTHING if alarm is None else f"{100 * alarm:.1f}%",
            ]
        )
    headers = ["noise of a repetition", "true change of the ratio", "worse", "better", "unusable"]
    return (
        f"Made-up sessions of {found['blocks']} interleaved blocks, {100 * STALL:.1f}% of repetitions stalled "
        f"threefold, each case one of {found['tests']} tests, against a record as noisy. A change up to 10% is "
        "tolerated; where the spread cannot carry a verdict it is `unusable`. *Session*: that any of the tests alarms, "
        "were all of them like this one.\n\n" + markup.table([*headers, "session alarms"], lines, words=())
    )
