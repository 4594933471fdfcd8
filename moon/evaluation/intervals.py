"""Confidence intervals of AUROC and FPR@95, and of their means, cheap at ten million images.

AUROC: the variance of DeLong, DeLong & Clarke-Pearson ("Comparing the Areas under Two or More
Correlated Receiver Operating Characteristic Curves", Biometrics 44, 1988), computed from the
curve's counts in one pass; the interval is symmetric in log-odds, so that it stays in [0, 1].

FPR@95: the percentile bootstrap, ID and OOD resampled each on its own, drawn without resampling
an image. The k-th smallest of n draws with replacement has the rank ceil(n * U) among the
originals, U being Beta(k, n - k + 1); and of the other set as many pass that threshold as a
binomial draw says. This is exactly the bootstrap's distribution, at two draws a resample. Where
every resample agrees, as with no image beyond the threshold, the interval is Wilson's.

The unweighted mean over several OOD sets is measured on one set of ID images, which the sets
share: their AUROCs and FPRs vary together. Both intervals follow from that, the same ID draw
counting for all sets: DeLong's components of an ID image are averaged over the sets before
their variance is taken, and a resample of the bootstrap gives every set the same ID images. The
OOD sets are taken to be drawn each on its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moon.evaluation.metrics import Floats, RocCurve, rate_ci

__all__ = ["auroc_ci", "fpr95_ci", "mean_auroc_ci", "mean_fpr95_ci", "mean_rate_ci"]

_Z = 1.959963984540054
Interval = tuple[float, float]


def auroc_ci(curve: RocCurve) -> tuple[float, float]:
    """95% interval of the AUROC of the two populations the scores were drawn from."""
    id_here = np.diff(curve.id_kept, prepend=0)
    ood_here = np.diff(curve.ood_kept, prepend=0)
    # Where each ID score stands among the OOD scores, ties counting half; and the reverse.
    id_wins = (curve.n_ood - curve.ood_kept + ood_here / 2) / curve.n_ood
    ood_loses = (curve.id_kept - id_here / 2) / curve.n_id
    variance = _variance_of_mean(id_wins, id_here) + _variance_of_mean(ood_loses, ood_here)
    return _in_log_odds(curve.auroc, variance, curve.n_id, curve.n_ood)


def mean_auroc_ci(id_scores: Floats, ood_scores: Sequence[Floats]) -> Interval:
    """95% interval of the mean of the AUROCs of several OOD sets against the same ID set.

    With V(i) the mean over the S sets of how often ID image i beats a set's images, and W_s(j)
    how often image j of the set s is beaten, the variance is Var V / n + sum_s Var W_s / m_s / S^2.
    A set told apart completely shows no variance, yet is not certain: what its own interval
    allows is added as in ``mean_rate_ci``.
    """
    known, count = np.sort(id_scores), len(ood_scores)
    wins, areas, variance = np.zeros(len(known)), [], 0.0
    for scores in ood_scores:
        unknown = np.sort(scores)
        here = _beaten(known, unknown)
        loses = 1 - _beaten(unknown, known)
        wins += here / count
        areas.append(float(np.mean(here)))
        variance += _variance_of_mean(loses) / count**2
    variance += _variance_of_mean(wins)
    mean = float(np.mean(areas))
    low, high = _in_log_odds(mean, variance, len(known), _alike(ood_scores))
    if all(area in (0, 1) for area in areas):
        return low, high
    below, above = (mean - low) ** 2, (high - mean) ** 2
    for area, scores in zip(areas, ood_scores, strict=True):
        if area in (0, 1):
            n = min(len(known), len(scores))
            least, most = rate_ci(int(area) * n, n)
            below += ((area - least) / count) ** 2
            above += ((most - area) / count) ** 2
    return max(0.0, mean - math.sqrt(below)), min(1.0, mean + math.sqrt(above))


def mean_fpr95_ci(
    id_scores: Floats,
    ood_scores: Sequence[Floats],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Interval, Interval]:
    """95% intervals of the means over the sets of ``fpr95_id_pos`` and of ``fpr95_ood_pos``.

    A set of which no resample lets any through adds no spread, yet is not certain: what its own
    interval allows is added as in ``mean_rate_ci``.
    """
    rng = np.random.default_rng(seed)
    known = np.sort(id_scores)
    sets = [np.sort(scores) for scores in ood_scores]
    # One threshold a resample, of the ID images, for all sets.
    bars = _drawn_threshold(-known[::-1], resamples, rng)
    passed = [
        rng.binomial(len(one), np.searchsorted(-one[::-1], bars, side="right") / len(one))
        / len(one)
        for one in sets
    ]
    # A threshold of each set's own, and the same ID images before all of them.
    own = np.stack([_drawn_threshold(one, resamples, rng) for one in sets], axis=1)
    shares = np.searchsorted(known, own, side="right") / len(known)
    rejected = _counted_together(shares, len(known), rng) / len(known)
    return (
        _mean_percentiles(np.stack(passed, axis=1), [len(one) for one in sets], _alike(sets)),
        # All of the one set of known images, so what is not certain of them adds up.
        _mean_percentiles(rejected, [len(known)] * len(sets), len(known), shared=True),
    )


def mean_rate_ci(rates: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """95% interval of the mean of independent rates from that of each.

    Source: Zou & Donner, "Construction of confidence limits about effect measures", Statistics
    in Medicine 27, 2008: distances to the limits add up as standard deviations do.
    """
    mean, count = float(np.mean(rates)), len(rates)
    below = sum((rate - low) ** 2 for rate, (low, _) in zip(rates, intervals, strict=True))
    above = sum((high - rate) ** 2 for rate, (_, high) in zip(rates, intervals, strict=True))
    return max(0.0, mean - math.sqrt(below) / count), min(1.0, mean + math.sqrt(above) / count)


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
    passing, m = np.sort(passing), len(passing)
    thresholds = _drawn_threshold(np.sort(kept), resamples, rng)
    shares = np.searchsorted(passing, thresholds, side="right") / m
    return _percentiles(rng.binomial(m, shares) / m, m)


def _drawn_threshold(kept: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """[R] Of each resample of the ascending ``kept``, the value that holds 95% of it."""
    n = len(kept)
    k = _ninety_five(n)
    ranks = np.ceil(n * rng.beta(k, n - k + 1, resamples)).astype(np.int64)
    drawn: Floats = kept[np.clip(ranks, 1, n) - 1]
    return drawn


def _counted_together(shares_RS: Floats, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """[R, S] How many of the same n draws fall below each of S points, given the shares below.

    The counts between neighbouring points are multinomial, drawn one after the other.
    """
    order_RS = np.argsort(shares_RS, axis=1)
    ascending_RS = np.take_along_axis(shares_RS, order_RS, axis=1)
    counts_RS = np.empty(shares_RS.shape, np.int64)
    below_R, share_R = np.zeros(len(shares_RS), np.int64), np.zeros(len(shares_RS))
    for s in range(shares_RS.shape[1]):
        room_R = np.maximum(1 - share_R, 1e-300)
        step_R = np.clip((ascending_RS[:, s] - share_R) / room_R, 0, 1)
        below_R = below_R + rng.binomial(n - below_R, step_R)
        share_R = ascending_RS[:, s]
        counts_RS[:, s] = below_R
    found_RS = np.empty_like(counts_RS)
    np.put_along_axis(found_RS, order_RS, counts_RS, axis=1)
    return found_RS


def _percentiles(drawn: Floats, n: int) -> Interval:
    low, high = map(float, np.quantile(drawn, [0.025, 0.975]))
    if low == high:
        # None passed in any resample, or all: a bootstrap cannot see how rare it may be.
        trial = rate_ci(round(low * n), n)
        return min(low, trial[0]), max(high, trial[1])
    return low, high


def _mean_percentiles(
    drawn_RS: Floats, sizes: Sequence[int], alike: int, *, shared: bool = False
) -> Interval:
    """Of the mean over S sets, by its resamples and the intervals of sets that have no spread."""
    drawn, count = drawn_RS.mean(axis=1), drawn_RS.shape[1]
    lows, highs = np.quantile(drawn_RS, [0.025, 0.975], axis=0)
    still = np.flatnonzero(lows == highs).tolist()
    low, high = map(float, np.quantile(drawn, [0.025, 0.975]))
    if len(still) == count:
        trial = rate_ci(round(float(lows.mean()) * alike), alike)
        return min(low, trial[0]), max(high, trial[1])
    if not still:
        return low, high
    mean = float(np.clip(drawn.mean(), low, high))
    own = [(lows[s], *rate_ci(round(lows[s] * sizes[s]), sizes[s])) for s in still]
    power = 1 if shared else 2
    down = sum(((rate - least) / count) ** power for rate, least, _ in own) ** (2 / power)
    up = sum(((most - rate) / count) ** power for rate, _, most in own) ** (2 / power)
    return (
        max(0.0, mean - math.sqrt((mean - low) ** 2 + down)),
        min(1.0, mean + math.sqrt((high - mean) ** 2 + up)),
    )


def _alike(sets: Sequence[Floats]) -> int:
    """So many images in one set make a rate as sure as the mean over these sets."""
    return math.floor(len(sets) ** 2 / sum(1 / len(one) for one in sets) + 1e-9)


def _in_log_odds(area: float, variance: float, n_id: int, n_ood: int) -> Interval:
    n = min(n_id, n_ood)
    if variance <= 0 or not 0 < area < 1 or n < 2:
        # Complete separation: as sure as so many trials without a miss can make one.
        low, high = rate_ci(round(area * n), n)
        return min(low, area), max(high, area)
    odds = math.log(area) - math.log1p(-area)
    half = _Z * math.sqrt(variance) / (area * (1 - area))
    return _probability(odds - half), _probability(odds + half)


def _beaten(values: Floats, others: Floats) -> Floats:
    """Of each value the share of the ascending ``others`` below it, ties counting half."""
    below = np.searchsorted(others, values, side="left")
    found: Floats = (below + np.searchsorted(others, values, side="right")) / (2 * len(others))
    return found


def _ninety_five(n: int) -> int:
    """The smallest k with k / n >= 0.95, by the same division as the metric's."""
    k = math.ceil(0.95 * n)
    while k > 1 and (k - 1) / n >= 0.95:
        k -= 1
    return min(k, n)


def _variance_of_mean(values: Floats, weights: Floats | None = None) -> float:
    if weights is None:
        return float(np.var(values, ddof=1)) / len(values) if len(values) > 1 else 0.0
    count = float(weights.sum())
    if count < 2:
        return 0.0
    mean = float(np.sum(values * weights)) / count
    return float(np.sum(weights * (values - mean) ** 2)) / (count - 1) / count


def _probability(odds: float) -> float:
    return 1 / (1 + math.exp(-odds)) if odds >= 0 else math.exp(odds) / (1 + math.exp(odds))
