"""A threshold that bounds the error among accepted inputs (selective risk)."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moon.binomial import beta_quantile, lower_tail_at_most, smallest_zero_tail
from moon.errors import CalibrationError, UsageError
from moon.gate import Achieved, Gate, as_float32
from moon.gate_calibration import Evidence, Rate, as_scores, rate, stored, too_few

__all__ = ["calibrate_risk", "fewest_for_risk"]

_PLACING_SHARE = 5  # one in five
_STEPS = 100
# A perfect model's gate is to be had with this probability at the fewest images that are named.
_SURE = 0.99
# The first test must be one a good model passes: room for an error or two in its images, and
# enough of them that chance does not leave it with hardly any.
_FIRST_TEST = 4
_FEWEST = 100


def calibrate_risk(
    scores_N: ArrayLike,
    correct_N: ArrayLike,
    risk: Rate,
    delta: Rate = 0.05,
    *,
    seed: int = 0,
    score: str = "",
    evidence: Evidence | None = None,
) -> Gate:
    """The loosest threshold whose error among the accepted is at most ``risk``.

    Fixed-sequence testing, as in "Learn then Test" (Angelopoulos et al., 2021), of the
    selective risk of Geifman and El-Yaniv (NeurIPS 2017):

    1. A random fifth of the set, by ``seed``, only places up to 100 thresholds, at even
       quantiles of its scores. That declares them before the rest is looked at.
    2. On the rest, walk from the strictest that is expected to accept enough to be tested
       to the loosest. Each test is Clopper and Pearson's: with e errors among m accepted,
       pass when P(Bin(m, risk) <= e) <= delta. Stop at the first that fails.
    3. The threshold is the last that passed: with probability 1 - delta over the draw, its
       true error among accepted inputs is at most ``risk``.

    Args:
        scores_N: [n] calibration scores, higher = more in-distribution.
        correct_N: [n] booleans, whether the classifier was right.
        risk: largest error among the accepted, in (0, 1).
        delta: chance that the promise fails over the calibration draw, in (0, 1).
        seed: of the random fifth.
        score: name of the score.
        evidence: backend, data hash and reason quantiles to record.

    Raises:
        CalibrationError: too few scores for any test to pass, or too few reached the only
            threshold, and how many it would take; or no threshold keeps the promise.
        UsageError: a rate is out of range, or the shapes differ.
    """
    exact, failing = rate(risk, "risk"), rate(delta, "delta")
    values, correct = as_float32(scores_N), np.asarray(correct_N, dtype=bool)
    if values.shape != correct.shape:
        raise UsageError(
            f"scores and correctness differ in shape: {list(values.shape)}, {list(correct.shape)}"
        )
    everything = as_scores(values)
    placing, testing = _parts(len(values), seed)
    enough = smallest_zero_tail(exact, failing)
    if len(testing) < enough:
        promise = f"an error of at most {float(exact):g} at delta {float(failing):g}"
        raise too_few(len(values), fewest_for_risk(exact, failing), promise)
    thresholds = _thresholds(values[placing], len(testing), enough)
    threshold = _walk(values[testing], correct[testing], thresholds, exact, failing, len(values))
    errors, accepted = _count(values[testing], correct[testing], threshold)
    scores, ranks = stored(everything, None)
    achieved: Achieved = {
        "reject": float(np.mean(everything < threshold)),
        "ci95": _reject_interval(everything, threshold),
        "error": errors / accepted,
        "error_bound": beta_quantile(1 - float(failing), errors + 1, accepted - errors)
        if errors < accepted
        else 1.0,
    }
    return Gate(
        score=score,
        threshold=threshold,
        method="risk",
        risk=float(exact),
        delta=float(failing),
        n=len(values),
        nonfinite=int(np.sum(~np.isfinite(everything))),
        achieved=achieved,
        scores=scores,
        ranks=ranks,
        **(evidence or {}),
    )


def _parts(n: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.random.default_rng(seed).permutation(n)
    cut = n // _PLACING_SHARE
    return order[:cut], order[cut:]


def fewest_for_risk(risk: Fraction, delta: Fraction) -> int:
    """The smallest n that gives a gate to a model without errors, in 99 of 100 draws.

    Fewer can do, down to those whose tested part alone is enough, but only by luck: the one
    threshold that so few images place is the lowest of the placing part, and what the tested
    part has below it does not count.
    """
    enough = smallest_zero_tail(risk, delta)
    n = max(enough, enough * _PLACING_SHARE // (_PLACING_SHARE - 1) - 2)
    while _chance_without_errors(n, enough) < _SURE:
        n += 1
    return n


def _chance_without_errors(n: int, enough: int) -> float:
    """The chance that at least ``enough`` of the tested scores reach the lowest placing one.

    That is, that not all of the lowest of the n scores, one more than can be spared, are
    tested ones; scores that tie only make it likelier.
    """
    tested = n - n // _PLACING_SHARE
    spare = tested - enough
    if spare < 0:
        return 0.0
    return 1.0 - math.prod((tested - i) / (n - i) for i in range(spare + 1))


def _thresholds(values: NDArray[np.float32], tested: int, enough: int) -> list[float]:
    """Thresholds from strict to loose, at even quantiles of the placing part's scores."""
    finite = np.sort(values[np.isfinite(values)])
    if not len(finite):
        raise CalibrationError(
            "too few finite scores to place thresholds", remedy="Use more held-out images"
        )
    strictest = min(1.0, max(_FEWEST, _FIRST_TEST * enough) / tested)
    shares = np.linspace(strictest, 1.0, _STEPS)
    at = len(finite) - np.ceil(shares * len(finite)).astype(np.int64)
    return list(dict.fromkeys(finite[at].tolist()))


def _walk(
    values: NDArray[np.float32],
    correct: NDArray[np.bool_],
    thresholds: list[float],
    risk: Fraction,
    delta: Fraction,
    n: int,
) -> float:
    passed = math.nan
    for threshold in thresholds:
        errors, accepted = _count(values, correct, threshold)
        if not lower_tail_at_most(errors, accepted, risk, delta):
            break
        passed = threshold
    if math.isnan(passed):
        errors, accepted = _count(values, correct, thresholds[0])
        fewest = fewest_for_risk(risk, delta)
        if not errors and n < fewest:
            raise CalibrationError(
                f"{n} calibration images were too few this time: the one threshold they allow "
                f"accepts {accepted} of those tested, none of them wrong, and an error of at most "
                f"{float(risk):g} takes {smallest_zero_tail(risk, delta)}",
                remedy=f"Use at least {fewest} held-out images, or a larger rate",
            )
        raise CalibrationError(
            f"no threshold keeps the error at most {float(risk):g}: the strictest tested "
            f"accepts {accepted} images with {errors} errors",
            remedy="Allow a larger --risk or --delta, use more images, or a better model",
        )
    return passed


def _count(
    values: NDArray[np.float32], correct: NDArray[np.bool_], threshold: float
) -> tuple[int, int]:
    accepted = np.isfinite(values) & (values >= np.float32(threshold))
    return int(np.sum(accepted & ~correct)), int(np.sum(accepted))


def _reject_interval(everything: NDArray[np.float32], threshold: float) -> list[float]:
    """Clopper and Pearson's 95% interval of the reject rate."""
    n, rejected = len(everything), int(np.sum(everything < threshold))
    low = beta_quantile(0.025, rejected, n - rejected + 1) if rejected else 0.0
    high = beta_quantile(0.975, rejected + 1, n - rejected) if rejected < n else 1.0
    return [low, high]
