"""Metrics of a classifier that may abstain, from raw float64 scores.

Every score is a confidence: higher means more in-distribution. Inputs are one-dimensional
arrays; infinities rank as the highest and lowest values, ties count exactly, NaN is an error.
Every rate is in [0, 1]. All functions are O(n log n).

Two FPR@95 conventions are in use, and both are here by name:

- ``fpr95_id_pos``: the share of OOD accepted where at least 95% of ID is accepted
  (OpenOOD v1; most papers).
- ``fpr95_ood_pos``: the share of ID rejected where at least 95% of OOD is caught (OpenOOD v1.5).

Sources: Hendrycks & Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution
Examples", ICLR 2017; Yang et al., "OpenOOD", NeurIPS 2022; Zhang et al., "OpenOOD v1.5", 2023.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moon.errors import UsageError

__all__ = [
    "OOD_METRICS",
    "RocCurve",
    "aupr_in",
    "aupr_out",
    "auroc",
    "bootstrap_ci",
    "fpr95_id_pos",
    "fpr95_ood_pos",
    "rate_ci",
]

OOD_METRICS = ("auroc", "fpr95_id_pos", "fpr95_ood_pos", "aupr_in", "aupr_out")

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class RocCurve:
    """How many inputs are kept at each distinct threshold, from the highest down.

    Attributes:
        thresholds: distinct scores, descending, [T].
        id_kept: ID inputs with a score >= the threshold, [T], ending in the number of ID inputs.
        ood_kept: OOD inputs with a score >= the threshold, [T].
    """

    thresholds: Floats
    id_kept: Ints
    ood_kept: Ints

    @classmethod
    def of(cls, id_scores: ArrayLike, ood_scores: ArrayLike) -> RocCurve:
        """Sort both sets together.

        Raises:
            UsageError: an empty set, a NaN, or an array that is not one-dimensional.
        """
        id_scores = vector(id_scores, "ID scores")
        ood_scores = vector(ood_scores, "OOD scores")
        pooled = np.concatenate([id_scores, ood_scores])
        order = np.argsort(pooled)[::-1]
        ranked = pooled[order]
        last_of_tie = tie_ends(ranked)
        id_kept = np.cumsum(order < len(id_scores), dtype=np.int64)[last_of_tie]
        return cls(ranked[last_of_tie], id_kept, last_of_tie + 1 - id_kept)

    @property
    def n_id(self) -> int:
        return int(self.id_kept[-1])

    @property
    def n_ood(self) -> int:
        return int(self.ood_kept[-1])

    @functools.cached_property
    def auroc(self) -> float:
        """P(ID score > OOD score) + P(equal) / 2: the Mann-Whitney statistic, in integers."""
        id_before = np.concatenate([[0], self.id_kept[:-1]])
        ood_here = np.diff(self.ood_kept, prepend=0)
        twice_wins = int(np.sum(ood_here * (id_before + self.id_kept)))
        return twice_wins / (2 * self.n_id * self.n_ood)

    @functools.cached_property
    def aupr_in(self) -> float:
        """Area under precision-recall with ID as the positive class, by trapezoids.

        The curve starts at recall 0 with precision 1, as in OpenOOD; scikit-learn's
        ``average_precision_score`` is a step sum and differs.
        """
        return _aupr(self.id_kept, self.ood_kept)

    @functools.cached_property
    def aupr_out(self) -> float:
        """As ``aupr_in`` with OOD as the positive class, the lowest score first."""
        return _aupr(*self._from_below()[::-1])

    @functools.cached_property
    def fpr95_id_pos(self) -> float:
        """Share of OOD accepted at the first threshold that accepts >= 95% of ID."""
        first = int(np.argmax(self.id_kept / self.n_id >= 0.95))
        return int(self.ood_kept[first]) / self.n_ood

    @functools.cached_property
    def fpr95_ood_pos(self) -> float:
        """Share of ID rejected at the first threshold that rejects >= 95% of OOD."""
        id_caught, ood_caught = self._from_below()
        first = int(np.argmax(ood_caught / self.n_ood >= 0.95))
        return int(id_caught[first]) / self.n_id

    def metrics(self) -> dict[str, float]:
        """Every metric of ``OOD_METRICS`` by name."""
        return {name: float(getattr(self, name)) for name in OOD_METRICS}

    def points(self, limit: int = 120) -> list[tuple[float, float]]:
        """At most about ``limit`` points (share of OOD accepted, share of ID accepted).

        From (0, 0) to (1, 1), chosen evenly along the curve, so that a plot of them is faithful.
        """
        x = np.concatenate([[0.0], self.ood_kept / self.n_ood])
        y = np.concatenate([[0.0], self.id_kept / self.n_id])
        wanted = np.searchsorted(x + y, np.linspace(0.0, 2.0, limit), side="left")
        chosen = np.unique(np.clip(wanted, 0, len(x) - 1))
        return [(round(float(x[i]), 6), round(float(y[i]), 6)) for i in chosen]

    def _from_below(self) -> tuple[Ints, Ints]:
        """ID and OOD inputs with a score <= each distinct score, ascending."""
        id_above = np.concatenate([[0], self.id_kept[:-1]])
        ood_above = np.concatenate([[0], self.ood_kept[:-1]])
        return (self.n_id - id_above)[::-1], (self.n_ood - ood_above)[::-1]


def auroc(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """See ``RocCurve.auroc``."""
    return RocCurve.of(id_scores, ood_scores).auroc


def aupr_in(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """See ``RocCurve.aupr_in``."""
    return RocCurve.of(id_scores, ood_scores).aupr_in


def aupr_out(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """See ``RocCurve.aupr_out``."""
    return RocCurve.of(id_scores, ood_scores).aupr_out


def fpr95_id_pos(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """See ``RocCurve.fpr95_id_pos``."""
    return RocCurve.of(id_scores, ood_scores).fpr95_id_pos


def fpr95_ood_pos(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """See ``RocCurve.fpr95_ood_pos``."""
    return RocCurve.of(id_scores, ood_scores).fpr95_ood_pos


def bootstrap_ci(
    statistic: Callable[..., float],
    *samples: ArrayLike,
    paired: bool = False,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``statistic(*samples)``.

    Args:
        samples: one-dimensional arrays, each resampled on its own with replacement.
        paired: the arrays describe the same inputs and are resampled together.
        resamples: how many times to draw.
        level: the interval's nominal coverage.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    arrays = [np.asarray(sample) for sample in samples]
    if not arrays or any(array.ndim != 1 or len(array) == 0 for array in arrays):
        raise UsageError("a bootstrap needs non-empty one-dimensional samples")
    if paired and len({len(array) for array in arrays}) > 1:
        raise UsageError("paired samples must have the same length")
    if resamples < 1 or not 0 < level < 1:
        raise UsageError("a bootstrap needs resamples >= 1 and a level between 0 and 1")
    rng = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for i in range(resamples):
        if paired:
            shared = rng.integers(len(arrays[0]), size=len(arrays[0]))
            drawn[i] = statistic(*(array[shared] for array in arrays))
        else:
            drawn[i] = statistic(*(rng.choice(array, size=len(array)) for array in arrays))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def rate_ci(hits: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a rate of ``hits`` in ``n``; 95% by default.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference",
    JASA 22, 1927.
    """
    if not 0 <= hits <= n or n < 1:
        raise UsageError(f"a rate needs 0 <= hits <= n and n >= 1, got {hits} of {n}")
    share, spread = hits / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * ((share * (1 - share) + spread / 4) / n) ** 0.5 / (1 + spread)
    low = 0.0 if hits == 0 else max(0.0, centre - half)
    high = 1.0 if hits == n else min(1.0, centre + half)
    return low, high


def vector(values: ArrayLike, what: str) -> Floats:
    """A non-empty float64 [N] without NaN, or a UsageError naming ``what``."""
    array: NDArray[Any] = np.asarray(values)
    if array.ndim != 1:
        raise UsageError(f"{what} must be one-dimensional, got shape {array.shape}")
    if len(array) == 0:
        raise UsageError(f"{what} are empty", remedy="Give at least one")
    floats = array.astype(np.float64, copy=False)
    if np.isnan(floats).any():
        raise UsageError(f"{what} hold {int(np.isnan(floats).sum())} NaN of {len(floats)}")
    return floats


def tie_ends(ranked: Floats) -> Ints:
    """Index of the last item of each run of equal values in a sorted array."""
    return np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)


def _aupr(positives: Ints, negatives: Ints) -> float:
    recall = np.concatenate([[0.0], positives / positives[-1]])
    precision = np.concatenate([[1.0], positives / (positives + negatives)])
    return float(np.sum(np.diff(recall) * (precision[1:] + precision[:-1])) / 2)
