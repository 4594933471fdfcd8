from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moon.errors import UsageError
from moon.scores import (
    SCORES,
    ebo,
    gen,
    known_logits,
    known_probabilities,
    mls,
    msp,
    score_function,
    softmax,
    unknown,
    unknown_probability,
)

# exp: 1, 2, 4, 1 -> p = 1/8, 2/8, 4/8, 1/8
HAND = np.log([[1.0, 2.0, 4.0, 1.0]])
LOGITS = arrays(
    np.float64, st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=st.floats(-30, 30)
)


def test_by_hand_with_the_unknown_class_last() -> None:
    assert softmax(HAND)[0] == pytest.approx([1 / 8, 2 / 8, 4 / 8, 1 / 8])
    assert msp(HAND, 3) == pytest.approx([4 / 8])
    assert ebo(HAND, 3) == pytest.approx([math.log(7)])
    assert ebo(HAND, 3, over_all=True) == pytest.approx([math.log(8)])
    assert mls(HAND, 3) == pytest.approx([math.log(4)])
    assert unknown(HAND, 3) == pytest.approx([-1 / 8])


def test_by_hand_with_the_unknown_class_being_the_largest() -> None:
    assert msp(HAND, 2) == pytest.approx([2 / 8])  # not renormalised over the known
    assert ebo(HAND, 2) == pytest.approx([math.log(4)])
    assert mls(HAND, 2) == pytest.approx([math.log(2)])
    assert unknown(HAND, 2) == pytest.approx([-4 / 8])


def test_by_hand_without_an_unknown_class() -> None:
    assert msp(HAND, None) == pytest.approx([4 / 8])
    assert ebo(HAND, None) == pytest.approx([math.log(8)])
    assert mls(HAND, None) == pytest.approx([math.log(4)])


def test_temperature_of_energy_by_hand() -> None:
    # T = 2: 2 * log(sum sqrt(exp z)) over the known.
    expected = 2 * math.log(1 + math.sqrt(2) + 2)
    assert ebo(HAND, 3, temperature=2.0) == pytest.approx([expected])


def test_minus_one_is_the_last_column() -> None:
    assert np.array_equal(known_logits(HAND, -1), known_logits(HAND, 3))
    assert unknown_probability(HAND, -1) == pytest.approx([1 / 8])


@pytest.mark.parametrize("shift", [1e4, -1e4, 1e300])
def test_large_logits_neither_overflow_nor_lose_the_answer(shift: float) -> None:
    logits = np.array([[0.0, 3.0, -2.0]]) + shift
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(msp(logits, 2)).all()
        assert ebo(logits, 2)[0] == pytest.approx(shift + math.log(1 + math.exp(3)), rel=1e-9)


def test_float32_logits_are_computed_in_float64() -> None:
    logits = np.array([[100.0, 0.0, 0.0]], np.float32)
    assert unknown(logits, 2)[0] < 0  # exp(-100) is not zero in float64
    assert all(SCORES[name](logits, 2).dtype == np.float64 for name in SCORES)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_has_no_finite_score_and_spoils_no_other(
    name: str, bad: float
) -> None:
    logits = np.array([[0.0, 1.0, 2.0], [bad, 1.0, 2.0]])
    found = SCORES[name](logits, 2)
    assert np.isfinite(found[0]) and not np.isfinite(found[1])


def test_all_minus_infinity_is_the_lowest_energy() -> None:
    assert ebo(np.full((1, 3), -np.inf), None)[0] == -np.inf


@given(LOGITS)
def test_known_and_unknown_probabilities_sum_to_one(logits: np.ndarray) -> None:
    last = logits.shape[1] - 1
    total = known_probabilities(logits, last).sum(axis=1) + unknown_probability(logits, last)
    assert total == pytest.approx(np.ones(len(logits)))


@given(LOGITS, st.floats(-100, 100))
def test_shifting_all_logits_moves_energy_alone(logits: np.ndarray, shift: float) -> None:
    last = logits.shape[1] - 1
    assert msp(logits + shift, last) == pytest.approx(msp(logits, last), abs=1e-9)
    assert ebo(logits + shift, last) == pytest.approx(ebo(logits, last) + shift, abs=1e-9)


def test_unknown_needs_an_unknown_class() -> None:
    with pytest.raises(UsageError, match=r"needs a model with an unknown class"):
        unknown(HAND, None)


def test_wrong_use_is_named() -> None:
    with pytest.raises(UsageError, match=r"shape \[N, L\].*\[3\]"):
        msp(np.zeros(3), None)
    with pytest.raises(UsageError, match=r"unknown_index 4 is outside the 4 logits"):
        msp(HAND, 4)
    with pytest.raises(UsageError, match=r"no known class remains"):
        mls(np.zeros((1, 1)), 0)
    with pytest.raises(UsageError, match=r"positive"):
        ebo(HAND, 3, temperature=0.0)
    with pytest.raises(UsageError, match=r"no score is called nope.*msp, ebo, mls, unknown"):
        score_function("nope")


# gen, which no exported graph has yet


def test_gen_by_hand() -> None:
    # Over the known 1, 2, 4: p = 1/7, 2/7, 4/7.
    terms = [(p * (1 - p)) ** 0.1 for p in (4 / 7, 2 / 7, 1 / 7)]
    assert gen(HAND, 3) == pytest.approx([-sum(terms)])
    assert gen(HAND, 3, top=2) == pytest.approx([-sum(terms[:2])])
    assert gen(HAND, 3, gamma=1.0) == pytest.approx([-(12 + 10 + 6) / 49])
    assert gen([[2.0]], None) == pytest.approx([0])


def test_gen_sums_the_hundred_largest_by_default() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 150))
    assert gen(logits, None) == pytest.approx(gen(logits, None, top=100))
    assert (gen(logits, None) > gen(logits, None, top=150)).all()
    few = logits[:, :60]
    assert gen(few, None) == pytest.approx(gen(few, None, top=60))


def test_gen_tells_confident_inputs_apart() -> None:
    # 1 - p is exp(-m) there, far below the spacing of numbers at 1.
    margins = np.array([30.0, 60.0, 100.0, 200.0, 700.0, 3000.0])
    logits = np.stack([margins, np.zeros(6)], axis=1)
    assert gen(logits, None) == pytest.approx(-2 * np.exp(-0.1 * margins), rel=1e-9)
    assert (np.diff(gen(logits, None)) > 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gen_of_a_row_that_is_not_finite_is_nan_alone(bad: float) -> None:
    found = gen([[0.0, 1.0, 2.0], [bad, 1.0, 2.0]], 2)
    assert np.isfinite(found[0]) and np.isnan(found[1])
    assert np.isfinite(gen([[-np.inf, 1.0, 0.0]], None)).all()


def test_gen_refuses_wrong_arguments() -> None:
    with pytest.raises(UsageError, match=r"4 largest of 3 known.*M from 1 to 3"):
        gen(HAND, 3, top=4)
    with pytest.raises(UsageError, match=r"0 largest"):
        gen(HAND, 3, top=0)
    for gamma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match=r"gamma must be a positive number"):
            gen(HAND, 3, gamma=gamma)
