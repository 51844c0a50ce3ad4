"""Part 1 of the gate's bench: how often the intervals hold the truth, by simulation.

`python benchmarks/gate/coverage.py` prints markdown tables. Claimed are: Student's t over windows within
two points of 95% for Gaussian and symmetric t3 differences from 8 windows on; the confidence sequence at least 95%
over orders where the text's window variance is within v. The other rows are shown, not claimed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from harness import sequential, stats

SEED = 20_251_122  # any number would do
WINDOWS = 148  # of the embedded model over lee under chunk:512
HALF_SIGMA = 1.96  # a binomial share's own 95% interval, in standard errors
Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]


def autocorrelated(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """An AR(1) walk of coefficient 0.5 along the last axis, mean 0, stationary."""
    noise = generator.normal(size=shape)
    walk = np.empty(shape)
    walk[..., 0] = noise[..., 0] / math.sqrt(1 - 0.25)
    for place in range(1, shape[-1]):
        walk[..., place] = 0.5 * walk[..., place - 1] + noise[..., place]
    return walk


def skewed(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """A lognormal of sigma 1.5, less its mean."""
    return generator.lognormal(0, 1.5, shape) - math.exp(1.5**2 / 2)


def one_in_fifty(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Mostly nothing: a difference of 1 in 2% of windows, less its mean."""
    return (generator.random(shape) < 0.02).astype(np.float64) - 0.02


POPULATIONS: dict[str, Draw] = {
    "Gaussian": lambda generator, shape: generator.normal(size=shape),
    "symmetric t3": lambda generator, shape: generator.standard_t(3, shape),
    "lognormal, sigma 1.5": skewed,
    "AR(1), coefficient 0.5": autocorrelated,
    "1 window in 50 differs": one_in_fifty,
}
CLAIMED = ("Gaussian", "symmetric t3")


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(header)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def share(count: int, runs: int) -> str:
    """A percentage with the half-width of its own interval."""
    part = count / runs
    return f"{100 * part:.1f} ± {100 * HALF_SIGMA * math.sqrt(max(part * (1 - part), 1 / runs) / runs):.1f}"


def marked(cell: str, claimed: bool) -> str:
    """Bold where the number is claimed."""
    return f"**{cell}**" if claimed else cell


def covered_by_student(values: Array) -> int:
    """Of (runs, windows) samples of mean 0, those whose interval holds 0; windows of equal size."""
    counts = np.ones(values.shape[1])
    estimates = [stats.weighted_mean(row, counts) for row in values]
    return sum(estimate.low <= 0 <= estimate.high for estimate in estimates)


def covered_by_ranks(values: Array) -> int:
    """The same of the Hodges-Lehmann interval."""
    estimates = [stats.hodges_lehmann(row) for row in values]
    return sum(estimate.low <= 0 <= estimate.high for estimate in estimates)


def student(runs: int) -> str:
    sizes, rows = (3, 5, 8, 16, 32, 148), []
    for name, draw in POPULATIONS.items():
        generator = np.random.default_rng(SEED)
        cells = [share(covered_by_student(draw(generator, (runs, size))), runs) for size in sizes]
        claimed = [name in CLAIMED and size >= stats.FEWEST_WINDOWS for size in sizes]
        rows.append([name, *map(marked, cells, claimed)])
    return table(["differences", *(f"{size} windows" for size in sizes)], rows)


def ranks(runs: int) -> str:
    sizes, rows = (6, 10, 20), []
    for name in CLAIMED:
        generator = np.random.default_rng(SEED)
        samples = (POPULATIONS[name](generator, (runs, size)) for size in sizes)
        rows.append([name, *(share(covered_by_ranks(sample), runs) for sample in samples)])
    return table(["log ratios", *(f"{size} blocks" for size in sizes)], rows)


def ever_outside(texts: Array, v: float, guarded: bool) -> int:
    """Of (runs, N) texts of mean 0 and window variance 1 in random order, those whose interval ever leaves 0 out.

    `guarded`: only until the running variance exceeds v, from where the whole text is read.
    """
    runs, windows = texts.shape
    a, _, bounds = sequential.fair_game(texts, np.ones(windows), windows, v)
    grid = sequential.bets(windows, v, sequential.ALPHA)
    outside = np.zeros((runs, windows), dtype=bool)
    for sign in (1, -1):
        outside |= sequential.log_capital(sign * a, bounds, grid) >= math.log(2 / sequential.ALPHA)
    if guarded:
        drawn = np.arange(1, windows + 1)
        squares = (texts**2).cumsum(1) - texts.cumsum(1) ** 2 / drawn
        stopped = (squares > v * (drawn - 1)) & (drawn >= stats.FEWEST_WINDOWS)
        outside &= ~np.logical_or.accumulate(stopped, axis=1)
        outside[:, : stats.FEWEST_WINDOWS - 1] = False  # no stop comes before
    return int(outside[:, :-1].any(1).sum())  # at the end the value is exact


def texts_of(draw: Draw, runs: int, generator: np.random.Generator) -> Array:
    """(runs, WINDOWS) whole texts of mean 0 and window variance 1, each in an order of its own."""
    texts = generator.permuted(draw(generator, (runs, WINDOWS)), axis=1)
    texts = texts - texts.mean(1, keepdims=True)
    deviation = texts.std(1, keepdims=True)
    scaled: Array = np.divide(texts, deviation, out=np.zeros_like(texts), where=deviation > 0)
    return scaled


def confidence_sequence(runs: int) -> str:
    bounds, rows = (1.5, 1.0, 0.5, 0.25, 0.1), []
    for name, draw in POPULATIONS.items():
        generator = np.random.default_rng(SEED)
        texts = texts_of(draw, runs, generator)
        for rule, guarded in (("interval", False), ("interval and guard", True)):
            cells = [share(runs - ever_outside(texts, v, guarded), runs) for v in bounds]
            rows.append([name, rule, *map(marked, cells, (v >= 1 for v in bounds))])
    return table(["text", "rule", *(f"v = {v:g} x variance" for v in bounds)], rows)


def report(runs: int) -> str:
    """The whole part as markdown."""
    return "\n\n".join(
        (
            "## Coverage by simulation",
            f"Percent of {runs:,} runs whose 95% interval holds the truth, ± the simulation's own 95% half-width. "
            "Bold: claimed. The rest is shown, not claimed.",
            "### Student's t over windows (`perplexity.delta`): text like this",
            student(runs),
            "### Hodges-Lehmann over blocks (latency's log ratio)",
            ranks(runs),
            f"### The confidence sequence over orders of one text of {WINDOWS} windows (`--stop-early`)",
            "At every window at once. *Interval and guard* counts what the harness would do: no stop before "
            f"{stats.FEWEST_WINDOWS} windows, none once the running variance exceeds v. The recorded v is 1.5 times "
            "the variance; columns under 1 are texts that vary more than v says.",
            confidence_sequence(runs),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Coverage of the harness's intervals, by simulation.")
    parser.add_argument("--runs", type=int, default=2000, help="simulated samples a cell (default 2000)")
    print(report(parser.parse_args().runs))


if __name__ == "__main__":
    main()
