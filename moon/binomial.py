"""Exact binomial tails, and the beta distribution through them.

For whole a and b the beta distribution is a binomial tail (Abramowitz and Stegun, 26.5.24):
BetaCDF(x; a, b) = P(Bin(a + b - 1, x) >= a). Sums of float64 terms decide everything except
near-ties, which are settled in exact integer arithmetic.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "beta_cdf",
    "beta_interval",
    "beta_quantile",
    "lower_tail",
    "lower_tail_at_most",
    "pac_rank",
    "smallest_zero_tail",
]

# Log-gamma of arguments up to 10^7 errs by about 1e-9 at most: closer than this is a tie.
_NEAR = 1e-7
# Of a quotient of logarithms, whole or not.
_DIGITS = 60


def lower_tail(successes: int, n: int, p: float) -> float:
    """P(Bin(n, p) <= successes)."""
    if successes < 0:
        return 0.0
    if successes >= n or p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    # Sum the side that the mean is not in: the other is 1 less a small number.
    below = successes < n * p
    i = np.arange(successes + 1) if below else np.arange(successes + 1, n + 1)
    terms = _log_choose(n)[i] + i * math.log(p) + (n - i) * math.log1p(-p)
    side = min(1.0, float(np.exp(terms).sum()))
    return side if below else 1.0 - side


def lower_tail_at_most(successes: int, n: int, p: Fraction, bound: Fraction) -> bool:
    """Whether P(Bin(n, p) <= successes) <= bound, decided exactly."""
    approximate, limit = lower_tail(successes, n, float(p)), float(bound)
    if abs(approximate - limit) > _NEAR * limit + 1e-12:
        return approximate <= limit
    hit, miss, whole = p.numerator, p.denominator - p.numerator, p.denominator
    term = miss**n  # whole**n * P(Bin = 0), then each next one by its ratio
    total = term if successes >= 0 else 0
    for i in range(1, min(successes, n) + 1):
        term = term * (n - i + 1) * hit // (i * miss)
        total += term
    return bool(total * bound.denominator <= bound.numerator * whole**n)


def pac_rank(n: int, alpha: Fraction, delta: Fraction) -> int:
    """The largest k with P(Bin(n, alpha) <= k - 1) <= delta; 0 when there is none."""
    low, high = 0, n  # the answer is in [low, high], and low always fits
    while low < high:
        middle = (low + high + 1) // 2
        if lower_tail_at_most(middle - 1, n, alpha, delta):
            low = middle
        else:
            high = middle - 1
    return low


def smallest_zero_tail(p: Fraction, bound: Fraction) -> int:
    """The smallest n with (1 - p)^n <= bound: below it no promise at that level can be had."""
    miss = 1 - p
    with localcontext() as context:
        # Never the powers themselves: at p = 1e-9 they have 10^11 digits.
        context.prec = _DIGITS + (p.denominator.bit_length() + bound.denominator.bit_length()) // 3
        exact = _decimal(bound).ln() / _decimal(miss).ln()
        nearest = int(exact.to_integral_value())
        n = int(exact.to_integral_value(ROUND_CEILING))
        tie = abs(exact - nearest) < Decimal(10) ** -(_DIGITS // 2)
    # Equality takes a denominator that is a power of the other one's, so never a long power.
    if tie and nearest * (miss.denominator.bit_length() - 1) <= bound.denominator.bit_length():
        n = nearest if miss**nearest <= bound else nearest + 1
    return max(1, n)


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / value.denominator


def beta_cdf(x: float, a: int, b: int) -> float:
    """The distribution function of Beta(a, b) at x, for whole a, b >= 1."""
    return 1.0 - lower_tail(a - 1, a + b - 1, x)


def beta_quantile(probability: float, a: int, b: int) -> float:
    """The x with BetaCDF(x; a, b) = probability, by bisection to float64's resolution."""
    low, high = 0.0, 1.0
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        if beta_cdf(middle, a, b) < probability:
            low = middle
        else:
            high = middle


def beta_interval(a: int, b: int) -> tuple[float, float]:
    """The central 95% of Beta(a, b)."""
    return beta_quantile(0.025, a, b), beta_quantile(0.975, a, b)


@lru_cache(maxsize=4)
def _log_choose(n: int) -> NDArray[np.float64]:
    """log C(n, i) for i = 0 .. n."""
    gammas = np.array([math.lgamma(i + 1) for i in range(n + 1)])
    table: NDArray[np.float64] = gammas[n] - gammas - gammas[::-1]
    table.setflags(write=False)
    return table
