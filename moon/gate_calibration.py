"""Finding a threshold with a promise, from held-out in-distribution scores.

Over all classes; :mod:`moon.class_calibration` does the same by predicted class.

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
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moon.binomial import beta_interval, pac_rank, smallest_zero_tail
from moon.errors import CalibrationError, UsageError
from moon.gate import Gate
from moon.per_class import PerClass
from moon.threshold import STORED_SCORES, Threshold, as_float32, stored_ranks

__all__ = ["Evidence", "Promise", "calibrate_conformal", "calibrate_pac", "rate"]

Rate = float | str | Fraction | Decimal


class Evidence(TypedDict, total=False):
    """What a gate records beside its threshold: see :class:`moon.gate.Gate`."""

    backend: str
    data_sha256: str
    reason: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Promise:
    """At most ``alpha`` of in-distribution inputs rejected.

    Attributes:
        alpha: that share.
        delta: None when it holds on average over calibrations (conformal); else the chance
            that it fails over the calibration draw (pac).
    """

    alpha: Fraction
    delta: Fraction | None = None

    @classmethod
    def of(cls, alpha: Rate, delta: Rate | None = None) -> Promise:
        """From rates as their decimal digits say them.

        Raises:
            UsageError: alpha or delta is out of range.
        """
        return cls(
            alpha=rate(alpha, "alpha"), delta=None if delta is None else rate(delta, "delta")
        )

    @property
    def method(self) -> str:
        """conformal or pac."""
        return "conformal" if self.delta is None else "pac"

    def rank(self, n: int) -> int:
        """Which of n calibration scores, 1 for the smallest, keeps it; below 1 none does."""
        if self.delta is None:
            return math.floor(self.alpha * (n + 1))
        return pac_rank(n, self.alpha, self.delta)

    @property
    def fewest(self) -> int:
        """The smallest n for which a rank keeps it."""
        if self.delta is None:
            return math.ceil(1 / self.alpha) - 1
        return smallest_zero_tail(self.alpha, self.delta)

    def __str__(self) -> str:
        often = "" if self.delta is None else f" at delta {float(self.delta):g}"
        return f"at most {float(self.alpha):g} rejected{often}"


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
    return _calibrate(scores_N, Promise.of(alpha), score, evidence)


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
    return _calibrate(scores_N, Promise.of(alpha, delta), score, evidence)


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


def stored(
    values: NDArray[np.float32], k: int | None, limit: int = STORED_SCORES
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The finite of the sorted ``values`` and their ranks, thinned evenly; rank k stays."""
    first = int(np.searchsorted(values, -np.inf, side="right")) + 1
    ranks = np.asarray(stored_ranks(first, len(values), k, limit), dtype=np.int64)
    return tuple(values[ranks - 1].tolist()), tuple(ranks.tolist())


def threshold_of(
    values: NDArray[np.float32], promise: Promise, limit: int = STORED_SCORES
) -> Threshold:
    """The threshold that keeps ``promise``, of :func:`as_scores`' values.

    Args:
        values: [n] sorted scores.
        promise: what to keep.
        limit: how many scores to store.

    Raises:
        CalibrationError: there are too few for it, or too many are not finite.
    """
    n, k = len(values), promise.rank(len(values))
    if k < 1:
        raise too_few(n, promise.fewest, str(promise))
    nonfinite = int(np.searchsorted(values, -np.inf, side="right"))
    if k <= nonfinite:
        raise CalibrationError(
            f"{nonfinite} of {n} calibration scores are not finite and would be rejected, "
            f"more than the {k - 1} that alpha {float(promise.alpha):g} allows",
            remedy="Find out why the model gives NaN or infinite scores on these images",
        )
    threshold = values[k - 1]
    scores, ranks = stored(values, k, limit)
    return Threshold(
        value=float(threshold),
        n=n,
        k=k,
        nonfinite=nonfinite,
        achieved={
            "reject": int(np.searchsorted(values, threshold, side="left")) / n,
            "ci95": list(beta_interval(k, n - k + 1)),
        },
        scores=scores,
        ranks=ranks,
    )


def gate_of(
    found: Threshold,
    promise: Promise,
    score: str,
    evidence: Evidence | None,
    per_class: PerClass | None = None,
) -> Gate:
    """The gate of a threshold over all classes, and of those by class."""
    return Gate(
        score=score,
        threshold=found.value,
        method=promise.method,
        alpha=float(promise.alpha),
        delta=None if promise.delta is None else float(promise.delta),
        n=found.n,
        k=found.k,
        nonfinite=found.nonfinite,
        achieved=found.achieved,
        scores=found.scores,
        ranks=found.ranks,
        per_class=per_class,
        **(evidence or {}),
    )


def _calibrate(
    scores_N: ArrayLike, promise: Promise, score: str, evidence: Evidence | None
) -> Gate:
    return gate_of(threshold_of(as_scores(scores_N), promise), promise, score, evidence)
