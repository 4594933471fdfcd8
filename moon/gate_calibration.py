"""Finding a threshold with a promise, from held-out in-distribution scores.

    conformal   at most a share alpha of in-distribution inputs is rejected, on average over
                draws of the calibration set
    pac         with probability 1 - delta over that draw, the reject rate is at most alpha
    risk        with probability 1 - delta over that draw, the error among the accepted is at
                most r (in :mod:`moon.risk_calibration`)

All hold for inputs exchangeable with the calibration set. They bound how much
in-distribution data is rejected, or misclassified; never how much out-of-distribution data
is accepted.

Scores are compared as float32, as backends compute them. NaN and infinite scores are never
accepted, so they count as the lowest: a calibration set with more of them than the promise
may reject is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moon.binomial import beta_interval, pac_rank, smallest_zero_tail
from moon.errors import CalibrationError, UsageError
from moon.gate import STORED_SCORES, Gate, as_float32

__all__ = ["Evidence", "calibrate_conformal", "calibrate_pac", "rate"]

Rate = float | str | Fraction | Decimal


class Evidence(TypedDict, total=False):
    """What a gate records beside its threshold: see :class:`moon.gate.Gate`."""

    backend: str
    data_sha256: str
    reason: Mapping[str, float]


def calibrate_conformal(
    scores_N: ArrayLike, alpha: Rate, *, score: str = "", evidence: Evidence | None = None
) -> Gate:
    """The split-conformal threshold: the k-th smallest score, k = floor(alpha * (n + 1)).

    Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005. A new
    exchangeable score falls below it with probability at most k / (n + 1) <= alpha; ties
    only lower that. k is computed in exact arithmetic from alpha's decimal digits.

    Args:
        scores_N: [n] calibration scores, higher = more in-distribution.
        alpha: largest reject rate, in (0, 1).
        score: name of the score.
        evidence: backend, data hash and reason quantiles to record.

    Raises:
        CalibrationError: k < 1, and how many scores it would take; or too many scores are
            not finite.
        UsageError: alpha is out of range, or the scores are not one-dimensional.
    """
    exact = rate(alpha, "alpha")
    values = as_scores(scores_N)
    k = math.floor(exact * (len(values) + 1))
    if k < 1:
        smallest = math.ceil(1 / exact) - 1
        raise too_few(len(values), smallest, f"at most {float(exact):g} rejected")
    return _at_rank(values, k, "conformal", exact, None, score, evidence)


def calibrate_pac(
    scores_N: ArrayLike,
    alpha: Rate,
    delta: Rate = 0.05,
    *,
    score: str = "",
    evidence: Evidence | None = None,
) -> Gate:
    """The threshold whose reject rate is at most alpha with probability 1 - delta.

    The k-th smallest score, for the largest k with BetaCDF(alpha; k, n - k + 1) >= 1 - delta:
    the true reject rate at the k-th smallest of n continuous scores is Beta(k, n - k + 1)
    (Vovk, "Conditional validity of inductive conformal predictors", ACML 2012; Wilks'
    tolerance limits, 1941). The tail is an exact binomial one.

    Args:
        scores_N: [n] calibration scores, higher = more in-distribution.
        alpha: largest reject rate, in (0, 1).
        delta: chance that the promise fails over the calibration draw, in (0, 1).
        score: name of the score.
        evidence: backend, data hash and reason quantiles to record.

    Raises:
        CalibrationError: no k will do, and how many scores it would take; or too many scores
            are not finite.
        UsageError: alpha or delta is out of range, or the scores are not one-dimensional.
    """
    exact, failing = rate(alpha, "alpha"), rate(delta, "delta")
    values = as_scores(scores_N)
    k = pac_rank(len(values), exact, failing)
    if k < 1:
        smallest = smallest_zero_tail(exact, failing)
        raise too_few(
            len(values), smallest, f"at most {float(exact):g} rejected at delta {float(failing):g}"
        )
    return _at_rank(values, k, "pac", exact, failing, score, evidence)


def rate(value: Rate, name: str) -> Fraction:
    """A rate as the exact fraction its decimal digits say: 0.29 is 29/100.

    Raises:
        UsageError: it is no number strictly between 0 and 1.
    """
    try:
        exact = value if isinstance(value, Fraction) else Fraction(Decimal(str(value)))
    except (InvalidOperation, ValueError, OverflowError) as error:
        raise UsageError(f"{name} must be a number between 0 and 1, not {value}") from error
    if not 0 < exact < 1:
        raise UsageError(f"{name} must lie between 0 and 1, not {value}")
    return exact


def as_scores(scores_N: ArrayLike) -> NDArray[np.float32]:
    """Scores as sorted float32, those not finite as -inf, first.

    Raises:
        UsageError: not one-dimensional.
        CalibrationError: there are none, or none is finite.
    """
    values = as_float32(scores_N)
    if values.ndim != 1:
        raise UsageError(f"calibration scores must have shape [n], not {list(values.shape)}")
    values = np.sort(np.where(np.isfinite(values), values, np.float32(-np.inf)))
    if not len(values) or not np.isfinite(values[-1]):
        what = "none of the calibration scores is finite" if len(values) else "there are no scores"
        raise CalibrationError(what, remedy="Check the calibration images and the model")
    return values


def too_few(n: int, smallest: int, promise: str) -> CalibrationError:
    return CalibrationError(
        f"{n} calibration images are too few to promise {promise}",
        remedy=f"Use at least {smallest} held-out images, or a larger rate",
    )


def stored(values: NDArray[np.float32], k: int | None) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The finite of the sorted ``values`` and their ranks, thinned evenly; rank k stays."""
    first = int(np.searchsorted(values, -np.inf, side="right")) + 1
    n = len(values)
    ranks = np.arange(first, n + 1)
    if len(ranks) > STORED_SCORES:
        even = np.linspace(first, n, STORED_SCORES - 1).round().astype(np.int64)
        ranks = np.unique(even if k is None else np.append(even, k))
    return tuple(values[ranks - 1].tolist()), tuple(ranks.tolist())


def _at_rank(
    values: NDArray[np.float32],
    k: int,
    method: str,
    alpha: Fraction,
    delta: Fraction | None,
    score: str,
    evidence: Evidence | None,
) -> Gate:
    n = len(values)
    nonfinite = int(np.searchsorted(values, -np.inf, side="right"))
    if k <= nonfinite:
        raise CalibrationError(
            f"{nonfinite} of {n} calibration scores are not finite and would be rejected, "
            f"more than the {k - 1} that alpha {float(alpha):g} allows",
            remedy="Find out why the model gives NaN or infinite scores on these images",
        )
    threshold = values[k - 1]
    scores, ranks = stored(values, k)
    return Gate(
        score=score,
        threshold=float(threshold),
        method=method,
        alpha=float(alpha),
        delta=None if delta is None else float(delta),
        n=n,
        k=k,
        nonfinite=nonfinite,
        achieved={
            "reject": int(np.searchsorted(values, threshold, side="left")) / n,
            "ci95": list(beta_interval(k, n - k + 1)),
        },
        scores=scores,
        ranks=ranks,
        **(evidence or {}),
    )
