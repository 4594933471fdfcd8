from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moon.binomial import (
    beta_cdf,
    beta_interval,
    beta_quantile,
    lower_tail,
    lower_tail_at_most,
    pac_rank,
    smallest_zero_tail,
)


@given(st.integers(1, 3000), st.data(), st.floats(0.001, 0.999))
def test_the_lower_tail_is_scipys(n: int, data: st.DataObject, p: float) -> None:
    k = data.draw(st.integers(-1, n))
    assert lower_tail(k, n, p) == pytest.approx(stats.binom.cdf(k, n, p), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(2400, 50_000), (50_000, 1_000_000)])
def test_the_lower_tail_stays_exact_for_many(k: int, n: int) -> None:
    assert lower_tail(k, n, 0.05) == pytest.approx(stats.binom.cdf(k, n, 0.05), rel=1e-7)


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.0, 1.0))
def test_the_beta_distribution_is_scipys(a: int, b: int, x: float) -> None:
    assert beta_cdf(x, a, b) == pytest.approx(stats.beta.cdf(x, a, b), rel=1e-8, abs=1e-11)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 59), (17, 484), (400, 3), (2500, 47501)])
def test_beta_quantiles_are_scipys(a: int, b: int) -> None:
    assert beta_interval(a, b) == pytest.approx(stats.beta.ppf([0.025, 0.975], a, b), rel=1e-7)
    assert beta_quantile(0.95, a, b) == pytest.approx(stats.beta.ppf(0.95, a, b), rel=1e-7)


@given(
    st.integers(0, 12),
    st.integers(1, 12),
    st.fractions(Fraction(1, 20), Fraction(19, 20), max_denominator=20),
    st.fractions(Fraction(1, 50), Fraction(1), max_denominator=50),
)
def test_comparing_a_tail_is_exact(k: int, n: int, p: Fraction, bound: Fraction) -> None:
    exact = sum((comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(min(k, n) + 1)), Fraction(0))
    assert lower_tail_at_most(k, n, p, bound) == (exact <= bound)
    assert lower_tail_at_most(k, n, p, exact) if exact > 0 else True  # a tie counts


def test_pac_rank_by_hand() -> None:
    # (1/2)^2 = 1/4 exactly: two scores are just enough at delta 1/4, not at anything less.
    assert pac_rank(2, Fraction(1, 2), Fraction(1, 4)) == 1
    assert pac_rank(2, Fraction(1, 2), Fraction(249, 1000)) == 0
    assert pac_rank(500, Fraction(1, 20), Fraction(1, 20)) == 17


@pytest.mark.parametrize("n", [59, 60, 100, 1000, 9999])
def test_pac_rank_is_the_largest_that_fits(n: int) -> None:
    k = pac_rank(n, Fraction(1, 20), Fraction(1, 20))
    assert stats.beta.cdf(0.05, k, n - k + 1) >= 0.95
    assert stats.beta.cdf(0.05, k + 1, n - k) < 0.95


def test_the_smallest_n() -> None:
    assert smallest_zero_tail(Fraction(1, 20), Fraction(1, 20)) == 59
    assert smallest_zero_tail(Fraction(1, 2), Fraction(1, 4)) == 2
    assert smallest_zero_tail(Fraction(9, 10), Fraction(1, 2)) == 1
    # A hair below an exact power it takes one more; and tiny rates take no time.
    third, power = Fraction(1, 3), Fraction(2, 3) ** 20
    assert smallest_zero_tail(third, power) == 20
    assert smallest_zero_tail(third, power - Fraction(1, 10**40)) == 21
    assert smallest_zero_tail(Fraction(1, 10**9), Fraction(1, 20)) == 2_995_732_273
