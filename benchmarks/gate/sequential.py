"""What stopping early saves on a real model, and how often it is wrong, over many orders of one text.

`python benchmarks/gate/sequential.py` measures the per-token losses of the embedded model over the `lee` text under
each method (minutes a method on two cores; `--keep DIR` keeps and reuses them), then draws the windows in random
orders and prints markdown tables. The variance bound is what a recorded baseline of the same text gives.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from coverage import Array, share, table
from numpy.typing import NDArray

from harness import sequential, stats

SEED = 20_251_122  # any number would do
METHODS = ("absmax-int8", "zeropoint-int8", "absmax-int8-tensor", "linear-int4", "linear-int4-affine", "nf4", "fp4")
BOUNDS = (1.005, 1.02, 1.1)  # ratios of perplexity: the 8-bit default, and what a user may set for 4 bits
Losses = NDArray[np.float32]


def measured(
    model: str, dataset: str, protocol: str, methods: Sequence[str], keep: Path | None
) -> tuple[Array, str, dict[str, Losses]]:
    """Scored tokens of each window, the text's hash, and per-token NLL of the reference and of every method."""
    from harness import arguments, catalog, checkpoints, corpora, engine, protocols
    from harness.options import Declared
    from harness.specifications import parse

    declared = Declared(Path.cwd())
    checkpoint = checkpoints.materialise(parse(model), declared)
    context = checkpoints.read_config(checkpoint).max_position_embeddings
    plan = protocols.plan(
        corpora.read(parse(dataset), declared),
        protocols.parse(parse(protocol)),
        checkpoints.tokenizer(checkpoint),
        context=context,
        max_tokens=None,
    )
    losses: dict[str, Losses] = {}
    for name in ("fp32", *methods):
        path = keep / f"{plan.token_hash[:16]}-{name}.npy" if keep else None
        if path and path.is_file():
            losses[name] = np.load(path, allow_pickle=False)
            continue
        method = catalog.methods()[name]
        loaded = method.load(checkpoint, arguments.resolve(parse(name), method, "cpu"), "cpu")
        losses[name] = engine.score(loaded, plan.windows, device="cpu")
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, losses[name])
    return np.array([window.scored for window in plan.windows if window.scored]), plan.token_hash, losses


def stops(differences: Array, counts: Array, v: float, bound: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Windows read and the side decided (-1 below, 1 above, 0 not before the end): (orders,) each.

    Args:
        differences: (orders, N) nats, each row an order.
        counts: (orders, N) tokens, in the same orders.
        v: variance bound, nats^2.
        bound: nats.
    """
    windows = differences.shape[1]
    weights = counts / counts.mean(1, keepdims=True)
    a, _, bounds = sequential.fair_game(differences - bound, weights, windows, v)  # so that m = 0 is the bound
    grid, threshold = sequential.bets(windows, v, sequential.ALPHA), math.log(2 / sequential.ALPHA)
    drawn = np.arange(1, windows + 1)
    mean = (weights * differences).cumsum(1) / weights.cumsum(1)
    square = weights**2
    squares = (
        (square * differences**2).cumsum(1) - 2 * mean * (square * differences).cumsum(1) + mean**2 * square.cumsum(1)
    )
    loud = (squares > v * (drawn - 1)) & (drawn >= stats.FEWEST_WINDOWS)
    open_ = ~np.logical_or.accumulate(loud, axis=1) & (drawn >= stats.FEWEST_WINDOWS) & (drawn < windows)
    read, side = np.full(len(differences), windows), np.zeros(len(differences), dtype=np.int64)
    for sign in (1, -1):
        crossed = np.logical_or.accumulate(sequential.log_capital(sign * a, bounds, grid) >= threshold, axis=1) & open_
        first = np.where(crossed.any(1), crossed.argmax(1) + 1, windows)
        side = np.where(first < read, sign, side)
        read = np.minimum(read, first)
    return read, side


def in_order(token_hash: str, means: Array, counts: Array, v: float, bound: float) -> sequential.State:
    """The state at which the harness itself would stop."""
    planned = counts.astype(int).tolist()
    fresh = sequential.Sequential(v, bound, counts=planned)
    return sequential.read(
        fresh, sequential.order(token_hash, planned).tolist(), lambda at: (float(means[at]), planned[at])
    )


def case_rows(
    name: str, token_hash: str, candidate: Losses, reference: Losses, counts: Array, orders: int
) -> list[dict[str, object]]:
    """One row a bound: what the whole text says, where orders stop, and how often they are wrong."""
    ends = counts.cumsum().astype(int)
    spans = [slice(end - count, end) for end, count in zip(ends.tolist(), counts.astype(int).tolist(), strict=True)]
    whole = stats.paired_delta(candidate, reference, spans)
    v = sequential.variance_bound((whole.low, whole.high), whole.count)
    change = candidate.astype(np.float64) - reference
    means = np.array([change[span].mean() for span in spans])
    generator = np.random.default_rng(SEED)
    drawn = np.array([generator.permutation(len(means)) for _ in range(orders)])  # (orders, N)
    rows: list[dict[str, object]] = []
    for ratio in BOUNDS:
        bound = math.log(ratio)
        read, side = stops(means[drawn], counts[drawn].astype(np.float64), v or 0.0, bound)
        truth = 1 if whole.value > bound else -1
        own = in_order(token_hash, means, counts, v or 0.0, bound)
        drawn_first = sequential.order(token_hash, counts.astype(int).tolist())[None]
        fast, _ = stops(means[drawn_first], counts[drawn_first].astype(np.float64), v or 0.0, bound)
        if fast[0] != own.windows:
            raise AssertionError(f"{name}: the bench stops after {fast[0]} windows, the harness after {own.windows}")
        rows.append(
            {
                "method": name,
                "bound": f"{100 * (ratio - 1):.3g}%",
                "D, nats": f"{whole.value:.5f} [{whole.low:.5f}, {whole.high:.5f}]",
                "decidable": not whole.low <= bound <= whole.high,
                "median windows": float(np.median(read)),
                "p90": float(np.percentile(read, 90)),
                "read whole, %": share(int((side == 0).sum()), orders),
                "wrong side, %": share(int((side == -truth).sum()), orders),
                "its own order": f"{own.windows} ({own.decided}) [{own.low:.5f}, {own.high:.5f}]",
            }
        )
    return rows


def report(counts: Array, token_hash: str, losses: dict[str, Losses], orders: int) -> str:
    """Markdown: every case, and the median of those that the whole text can decide."""
    rows: list[dict[str, object]] = []
    for name, losses_of in losses.items():
        if name != "fp32":
            rows += case_rows(name, token_hash, losses_of, losses["fp32"], counts, orders)
    decidable: list[float] = [float(str(row["median windows"])) for row in rows if row["decidable"]]
    middle = float(np.median(decidable)) if decidable else math.nan
    windows = len(counts)
    return "\n\n".join(
        (
            "## What stopping early saves",
            f"{windows} windows, {int(counts.sum()):,} scored tokens; {orders:,} random orders a case. Decidable: the "
            "whole text's Student interval lies on one side of the bound.",
            table(rows[0], (row.values() for row in rows)),
            f"Of {len(decidable)} decidable cases (of {len(rows)}) the median one stops after {middle:g} windows, "
            f"{100 * middle / windows:.0f}% of the text.",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What stopping early saves, over orders of one text.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dataset", default="lee")
    parser.add_argument("--protocol", default="chunk:512")
    parser.add_argument("--methods", default=",".join(METHODS), help="names without arguments, separated by commas")
    parser.add_argument("--orders", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="folder in which per-token losses are kept and found again")
    given = parser.parse_args()
    text = (given.model, given.dataset, given.protocol)
    print(report(*measured(*text, given.methods.split(","), given.keep), given.orders))


if __name__ == "__main__":
    main()
