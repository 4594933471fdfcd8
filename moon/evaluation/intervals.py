"""Confidence intervals of AUROC and FPR@95 that stay cheap at ten million images.

AUROC: the variance of DeLong, DeLong & Clarke-Pearson ("Comparing the Areas under Two or More
Correlated Receiver Operating Characteristic Curves", Biometrics 44, 1988), computed from the
curve's counts in one pass; the interval is symmetric in log-odds, so that it stays in [0, 1].

FPR@95: the percentile bootstrap, ID and OOD resampled each on its own, drawn without resampling
an image. The k-th smallest of n draws with replacement has the rank ceil(n * U) among the
originals, U being Beta(k, n - k + 1); and of the other set as many pass that threshold as a
binomial draw says. This is exactly the bootstrap's distribution, at two draws a resample. Where
every resample agrees, as with no image beyond the threshold, the interval is Wilson's.
"""

from __future__ import annotations

import math

import numpy as np

from moon.evaluation.metrics import Floats, RocCurve, rate_ci

__all__ = ["auroc_ci", "fpr95_ci"]

_Z = 1.959963984540054


def auroc_ci(curve: RocCurve) -> tuple[float, float]:
    """95% interval of the AUROC of the two populations the scores were drawn from."""
    id_here = np.diff(curve.id_kept, prepend=0)
    ood_here = np.diff(curve.ood_kept, prepend=0)
    # Where each ID score stands among the OOD scores, ties counting half; and the reverse.
    id_wins = (curve.n_ood - curve.ood_kept + ood_here / 2) / curve.n_ood
    ood_loses = (curve.id_kept - id_here / 2) / curve.n_id
    area = curve.auroc
    variance = _variance_of_mean(id_wins, id_here) + _variance_of_mean(ood_loses, ood_here)
    if variance <= 0 or not 0 < area < 1:
        # Complete separation: as sure as so many trials without a miss can make one.
        n = min(curve.n_id, curve.n_ood)
        low, high = rate_ci(round(area * n), n)
        return min(low, area), max(high, area)
    odds = math.log(area) - math.log1p(-area)
    half = _Z * math.sqrt(variance) / (area * (1 - area))
    return _probability(odds - half), _probability(odds + half)


def fpr95_ci(
    id_scores: Floats, ood_scores: Floats, *, resamples: int = 1000, seed: int = 0
) -> tuple[tuple[float, float], tuple[float, float]]:
    """95% intervals of ``fpr95_id_pos`` and of ``fpr95_ood_pos``."""
    rng = np.random.default_rng(seed)
    one = _passing(-id_scores, -ood_scores, resamples, rng)
    other = _passing(ood_scores, id_scores, resamples, rng)
    return one, other


def _passing(
    kept: Floats, passing: Floats, resamples: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Share of ``passing`` at or below the value that holds 95% of ``kept``: its interval."""
    kept, passing = np.sort(kept), np.sort(passing)
    n, m = len(kept), len(passing)
    k = _ninety_five(n)
    ranks = np.ceil(n * rng.beta(k, n - k + 1, resamples)).astype(np.int64)
    thresholds = kept[np.clip(ranks, 1, n) - 1]
    shares = np.searchsorted(passing, thresholds, side="right") / m
    low, high = map(float, np.quantile(rng.binomial(m, shares) / m, [0.025, 0.975]))
    if low == high:
        # None passed in any resample, or all: a bootstrap cannot see how rare it may be.
        trial = rate_ci(round(low * m), m)
        return min(low, trial[0]), max(high, trial[1])
    return low, high


def _ninety_five(n: int) -> int:
    """The smallest k with k / n >= 0.95, by the same division as the metric's."""
    k = math.ceil(0.95 * n)
    while k > 1 and (k - 1) / n >= 0.95:
        k -= 1
    return min(k, n)


def _variance_of_mean(values: Floats, weights: Floats) -> float:
    count = float(weights.sum())
    if count < 2:
        return 0.0
    mean = float(np.sum(values * weights)) / count
    return float(np.sum(weights * (values - mean) ** 2)) / (count - 1) / count


def _probability(odds: float) -> float:
    return 1 / (1 + math.exp(-odds)) if odds >= 0 else math.exp(odds) / (1 + math.exp(odds))
