from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from harness.inputs.texts import synthetic


def entropy_rate() -> float:
    """Of the language, in nats a word, by the formula of the module: no predictor's expected loss lies below it."""
    table = synthetic.transitions()
    conditional = -np.sum(table * np.log(table), axis=2)  # (V, V)
    return float(np.sum(synthetic.stationary() * conditional))


def test_the_text_is_the_same_on_every_machine() -> None:
    text = synthetic.text(10_000, seed=2)
    assert text.split()[:6] == ["bi", "mo", "ge", "hu", "hu", "ki"]
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256_OF_10_000_WORDS


def test_seeds_are_different_texts_and_a_longer_text_goes_on() -> None:
    assert synthetic.text(500, seed=1) != synthetic.text(500, seed=2)
    assert synthetic.text(500, seed=3).split() == synthetic.text(900, seed=3).split()[:500]
    assert synthetic.text(500) == synthetic.text(500, synthetic.HELD_OUT_SEED)


def test_words_and_lines() -> None:
    assert len(set(synthetic.WORDS)) == 62
    lines = synthetic.text(50).split("\n")
    assert [len(line.split(" ")) for line in lines] == [24, 24, 2]
    with pytest.raises(ValueError, match="0 words"):
        synthetic.text(0)


def test_weights_are_powers_of_two_and_probabilities_sum_to_one() -> None:
    table = synthetic.transitions()
    assert table.shape == (62, 62, 62)
    np.testing.assert_allclose(table.sum(axis=2), 1.0, atol=1e-12)
    ratio = np.log2(table / table.max(axis=2, keepdims=True))  # ratios of weights: whole powers of two
    np.testing.assert_allclose(ratio, np.round(ratio), atol=1e-9)
    assert ratio.min() >= -10
    # u[a, c] w[b, c]: the log-odds of two words add up over a and b
    odds = np.log2(table[:, :, 5] / table[:, :, 9])  # (a, b)
    np.testing.assert_allclose(odds[3, 4] + odds[7, 8], odds[3, 8] + odds[7, 4], atol=1e-9)


def test_the_stationary_distribution_is_a_fixed_point_with_equal_margins() -> None:
    pairs, table = synthetic.stationary(), synthetic.transitions()
    assert math.isclose(pairs.sum(), 1.0, abs_tol=1e-12)
    assert pairs.min() > 0
    following = np.zeros_like(pairs)
    for a in range(62):
        following += pairs[a][:, None] * table[a]
    np.testing.assert_allclose(following, pairs, atol=1e-14)
    np.testing.assert_allclose(pairs.sum(axis=0), pairs.sum(axis=1), atol=1e-14)


def test_the_entropy_rate_is_what_the_text_costs_under_its_own_law() -> None:
    ids = np.array(synthetic.word_ids(100_000, seed=5))
    nll = -np.log(synthetic.transitions()[ids[:-2], ids[1:-1], ids[2:]])
    error = nll.std() / math.sqrt(len(nll))
    assert abs(nll.mean() - entropy_rate()) < 4 * error
    assert error < 0.01 * entropy_rate()


def test_the_word_before_the_last_one_matters() -> None:
    pairs = synthetic.stationary()
    order_one = -np.sum(pairs * np.log(pairs / pairs.sum(axis=1, keepdims=True)))
    order_zero = -np.sum(pairs.sum(axis=0) * np.log(pairs.sum(axis=0)))
    assert entropy_rate() < order_one - 0.4 < order_zero - 0.8
    assert order_zero < math.log(62)


SHA256_OF_10_000_WORDS = "fe7e45c3172af143c4de521c0fc6ab1457e7cfa5b4ca2315cd5a173d1038c47e"
