"""Losses under other kernels: what is told of them, and how sessions of them are judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import beta

from harness.core.errors import UnknownName
from studies.gate import noise, other_kernels, small, tolerable
from studies.gate.noise import Series
from studies.gate.other_kernels import Pair, Population

TEXT = {"lee": "lee"}
ONE = Series("one", "tiny-gpt2", "chunk:64", 2, ("eager attention", "one thread"), {"fp32": 1, "bf16": 1})


def made(rms: float, away: float = 0.0) -> Pair:
    """1,020 losses and the same under another kernel; `away` from the reference's by so much a token."""
    chance = np.random.default_rng(1)
    then = chance.gamma(2.0, 1.5, 4 * 255) + away * chance.normal(size=4 * 255)
    return Pair(then.astype(np.float32), (then + rms * chance.normal(size=len(then))).astype(np.float32))


@pytest.mark.parametrize(("count", "runs"), [(0, 100), (1, 100), (7, 300), (60, 2000), (5, 5)])
def test_the_upper_limit_is_clopper_and_pearsons(count: int, runs: int) -> None:
    wanted = 1.0 if count == runs else beta.ppf(0.95, count + 1, runs - count)
    assert small.upper_limit(count, runs) == pytest.approx(wanted, abs=1e-9)


def test_changes_of_tokens_are_described() -> None:
    chance = np.random.default_rng(2)
    told = noise.described({name: 0.05 * chance.normal(size=2000) for name in "abcd"} | {"e": np.zeros(2000)})
    assert (told["slices"], told["equal"], told["tokens"], told["moved"]) == (5, 1, 10_000, 0.8)
    assert told["rms"] == pytest.approx(0.05 * 0.8**0.5, rel=0.03)
    assert abs(told["shift"]) < 3 * told["error"]
    assert abs(told["lag"]) < 0.05
    moved = noise.described({name: np.full(100, shift) for name, shift in {"a": 0.1, "b": -0.1}.items()})
    assert moved["lag"] == pytest.approx(1)
    assert moved["dispersion"] == pytest.approx(200)


def test_each_kernel_scores_the_same_slices_once(tmp_path: Path) -> None:
    folder = noise.folder_of(ONE)
    for kernel in (noise.USUAL, *ONE.kernels):
        noise.work(ONE, kernel, {}, tmp_path, folder)
    pieces = noise.slices(ONE, {}, folder)
    assert [[window.scored for window in piece.windows] for piece in pieces] == [[63, 63]]
    eager, alone = (
        noise.changes(*(noise.losses_of(tmp_path, ONE, name, "bf16") for name in (kernel, noise.USUAL)))
        for kernel in ONE.kernels
    )
    assert 0 < np.abs(eager["synthetic-2000"]).max() < 0.1
    assert not alone["synthetic-2000"].any(), "short windows run on one thread each anyway"
    found = noise.kernels_of(ONE, tmp_path)
    assert [(entry["kernel"], entry["method"]) for entry in found][:2] == [
        ("eager attention", "fp32"),
        ("eager attention", "bf16"),
    ]
    assert "eager attention" in noise.render({"texts": ["lee"], "kernels": found, "derived": noise.derived(found)})
    runs = other_kernels.measured_runs(ONE, tmp_path)
    assert [other_kernels.equal(session) for _, _, session in runs] == [False, True]


def test_an_edited_config_is_read_from_a_copy(tmp_path: Path) -> None:
    folder = Path(noise.folder_of(ONE))
    before = (folder / "config.json").read_text()
    noise.edited(str(folder), {"layer_norm_epsilon": 10.0}, tmp_path)
    assert '"layer_norm_epsilon": 0.0001' in (tmp_path / "config.json").read_text()
    assert (folder / "config.json").read_text() == before


def test_real_texts_are_read_in_turn() -> None:
    assert noise.read_texts("lee,ptb=ptb:f.txt") == {"lee": "lee", "ptb": "ptb:f.txt"}
    with pytest.raises(UnknownName, match="'embeded'"):
        noise.main(["--series", "embeded"])


def test_sessions_are_judged_by_the_rules_and_alarm_on_a_true_change() -> None:
    counts = [255] * 4
    quiet = {"fp32": made(1e-7), "bf16": made(0.03, 0.2)}
    assert not other_kernels.alarms(other_kernels.judged("m", quiet, counts))
    loud = other_kernels.shifted(quiet, "bf16", 0.1)
    called = other_kernels.alarms(other_kernels.judged("m", loud, counts))
    assert {row.method for row in called} == {"bf16"}


def test_drawn_texts_keep_methods_on_the_same_tokens() -> None:
    tokens = np.arange(2 * 300, dtype=np.float32).reshape(2, 300)
    both = {"fp32": tokens, "bf16": tokens}
    change = {"k": {"fp32": np.zeros_like(tokens), "bf16": np.ones_like(tokens)}}
    known = Population({"k": both}, change, both, {"fp32": 0.0, "bf16": 0.0})
    session = known.draw(np.random.default_rng(1), 3)
    assert np.array_equal(session["bf16"].now, session["fp32"].then + 1)
    assert all(len(pair.now) == 3 * other_kernels.WIDTH for pair in session.values())
    covered = other_kernels.coverage(known, 10)
    assert [line["held"] for line in covered] == [1.0, 1.0, 1.0], "no spread: the interval is the truth"


def test_a_bound_lies_above_everything_that_was_seen() -> None:
    assert tolerable.step(0.0044) == 1.005
    assert tolerable.step(1.0) is None
    row = {"model": "m", "text": "t", "method": "bnb-int8", "high": 0.031}
    (found,) = (line for line in tolerable.derived([row]) if line["method"] == "bnb-int8")
    assert (found["bound"], found["of"]) == (1.05, "m on t")
    assert all(one.ratio > 1 for one in tolerable.PUBLIC)
