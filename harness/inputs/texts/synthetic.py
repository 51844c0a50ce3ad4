"""A seeded language whose entropy rate is known exactly: the text on which the tiny models are trained and measured.

An order-2 Markov chain over V = 62 words. With integer weights u, w that are powers of two,

    P(c | a, b) = u[a, c] w[b, c] / sum_c' u[a, c'] w[b, c']

so a predictor must attend to the word before the last one. The chain over pairs (a, b) is strictly positive, hence
ergodic; with its stationary distribution pi the entropy rate, in nats a word, is

    h = - sum_(a,b) pi(a, b) sum_c P(c | a, b) ln P(c | a, b)

(Cover and Thomas, Elements of Information Theory, theorem 4.2.4 on the chain of pairs), and no predictor's expected
perplexity lies below exp(h). Only integers and IEEE-exact operations choose the words, so a text is the same on every
machine and under every numpy: a PCG64 bit stream is kept across numpy versions, the Generator's distributions are not.
"""

from __future__ import annotations

import functools
from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

LANGUAGE_SEED = 20_240  # of the transition weights: the language itself
TRAINING_SEED = 1
HELD_OUT_SEED = 2  # of the text that is measured
WORDS = tuple(consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou")[:62]  # and 2 specials: 64
EXPONENTS = 6  # weights are 2^0 .. 2^5: far enough from uniform that a damaged model shows
BURN_IN_WORDS = 64  # dropped: the chain forgets its start pair far sooner
LINE_WORDS = 24  # words a line, so that a text has sentences


@functools.cache
def _weights() -> NDArray[np.int64]:
    """Integer transition weights u[a, c] w[b, c]: (V, V, V) over (a, b, c)."""
    size = len(WORDS)
    raw = np.random.PCG64(LANGUAGE_SEED).random_raw(2 * size * size)
    exponents = ((raw >> np.uint64(32)) % np.uint64(EXPONENTS)).astype(np.int64)  # high bits: the better mixed ones
    earlier, last = np.left_shift(1, exponents).reshape(2, size, size)
    return np.asarray(earlier[:, None, :] * last[None, :, :])


def transitions() -> NDArray[np.float64]:
    """P(c | a, b) as (V, V, V) over (a, b, c): the word before the last, the last, the next."""
    weights = _weights()
    return np.asarray(weights / weights.sum(axis=2, keepdims=True))


@functools.cache
def stationary() -> NDArray[np.float64]:
    """The stationary distribution over pairs (a, b): (V, V), summing to 1; a fixed point to rounding."""
    table = transitions()
    pairs = np.full(table.shape[:2], 1.0 / table.shape[0] ** 2)
    for _ in range(1000):  # geometric convergence: some 20 steps serve
        following = np.einsum("ab,abc->bc", pairs, table)
        following /= following.sum()
        if np.abs(following - pairs).max() < 1e-17:
            return np.asarray(following)
        pairs = following
    raise ArithmeticError("the stationary distribution of the synthetic language did not converge")


def word_ids(words: int, seed: int) -> list[int]:
    """Indices into WORDS of `words` words of the language; equal arguments give equal words on every machine."""
    if words < 1:
        raise ValueError(f"a text of {words} words")
    cumulative = np.cumsum(_weights(), axis=2).tolist()
    draws = np.random.PCG64(seed).random_raw(words + BURN_IN_WORDS) >> np.uint64(11)  # 53 bits: exact as a float
    a, b = 0, 1
    chosen = []
    for draw in draws.tolist():
        table = cumulative[a][b]
        a, b = b, bisect_right(table, draw * table[-1] >> 53)
        chosen.append(b)
    return chosen[BURN_IN_WORDS:]


def text(tokens: int, seed: int = HELD_OUT_SEED) -> str:
    """A text of `tokens` words (one token each under the tiny models' tokenizer), 24 a line; ValueError below 1."""
    words = [WORDS[index] for index in word_ids(tokens, seed)]
    return "\n".join(" ".join(words[start : start + LINE_WORDS]) for start in range(0, len(words), LINE_WORDS))
