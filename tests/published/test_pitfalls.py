"""Known pitfalls by name, and their formulas by hand; `studies/tests/test_pitfalls.py` holds them to models."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness import published
from harness.published.claims import SHIPPED
from harness.published.pitfalls import (
    PITFALLS,
    averaged,
    in_fp32,
    kept_code,
    perplexity,
    restored,
    tied_twice,
    with_padding,
)


def test_every_fault_that_a_claim_names_is_a_known_pitfall() -> None:
    claims = published.read(SHIPPED)
    named = {claim.fault for claim in claims} - {""}
    named |= {fault for claim in claims if claim.timing for fault in claim.timing.faults}
    assert len(named) > 8
    assert named <= PITFALLS.keys()


def test_every_pitfall_says_how_to_recognise_it() -> None:
    assert all(len(pitfall.tell) > 20 and len(pitfall.mark) > 20 for pitfall in PITFALLS.values())


def test_an_fp32_exponential_overflows_where_a_double_does_not() -> None:
    assert in_fp32([88.0]) == pytest.approx(math.exp(88), rel=1e-5)
    assert in_fp32([89.0]) == math.inf
    assert perplexity([89.0]) == pytest.approx(math.exp(89))
    assert perplexity(np.array([710.0])) == math.inf


def test_the_top_code_of_2_to_the_b_is_kept_as_0() -> None:
    assert [kept_code(value, 0, 256, 256) for value in (0, 128, 255, 256)] == [0, 128, 255, 0]
    assert kept_code(256, 0, 256, 255) == 255
    assert [kept_code(value, -1, 1, 15, bits=4) for value in (-1, 1)] == [0, 15]
    assert restored(15, -1, 1, 15) == 1.0


def test_padding_weighs_by_its_share_in_nats() -> None:
    assert with_padding(10, 1000, 0) == pytest.approx(10)
    assert with_padding(10, 1000, 0.5) == pytest.approx(100)
    assert with_padding(10, 1000, 1) == pytest.approx(1000)


def test_perplexities_are_averaged_piece_by_piece() -> None:
    nll = [0.0, math.log(4), math.log(9)]
    assert averaged(nll, [1, 2]) == pytest.approx((1 + 6) / 2)
    assert averaged(nll, [3]) == pytest.approx(perplexity(nll))


def test_a_tied_head_adds_its_matrix_once_more() -> None:
    assert tied_twice(1000, vocabulary=50, width=4) == 1800
