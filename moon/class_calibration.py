"""Finding a threshold for each predicted class, each with a promise of its own.

Calibration inputs are split by the class that the model predicts for them, and each part is
calibrated like a set of its own (Mondrian conformal prediction: Vovk, Gammerman and Shafer,
"Algorithmic Learning in a Random World", 2005, section 4.5; the taxonomy here is the
prediction). What is promised then holds for the inputs predicted as that class:

    conformal   of in-distribution inputs predicted as c, at most a share alpha is rejected,
                on average over draws of the calibration set
    pac         for each c, with probability 1 - delta over that draw, the share of them
                rejected is at most alpha; for all of K classes at once, ask for delta / K

A class predicted for fewer calibration inputs than admit any threshold is pooled: such
classes are calibrated together and share a threshold, and the promise holds for inputs
predicted as any of them, taken together. Where all of those are still too few, the class
with the fewest of the others joins them, and so on. Which classes are pooled depends on how
often each was predicted and not on a score, so it costs none of the promises. Where that
leaves no class with a threshold of its own, nothing is promised by class, and it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moon.errors import CalibrationError, UsageError
from moon.gate import Gate
from moon.gate_calibration import Evidence, Promise, as_scores, gate_of, threshold_of, too_few
from moon.per_class import PerClass
from moon.threshold import STORED_SCORES, Threshold, as_float32

__all__ = ["calibrate_per_class"]

# Of the scores a gate stores, how many may be those over all classes, which decide nothing.
_OVERALL = 2_000
# A thinned set keeps its ends and the threshold.
_LEAST_STORED = 3


def calibrate_per_class(
    scores_N: ArrayLike,
    labels_N: ArrayLike,
    classes: Sequence[str],
    promise: Promise,
    *,
    score: str = "",
    evidence: Evidence | None = None,
) -> Gate:
    """A gate with a threshold for each predicted class.

    Args:
        scores_N: [n] calibration scores, higher = more in-distribution.
        labels_N: [n] predicted classes, in 0 .. K - 1; true ones are not needed.
        classes: names of the K known classes.
        promise: what each threshold keeps.
        score: name of the score.
        evidence: backend, data hash and reason quantiles to record.

    Returns:
        A gate whose threshold outside ``per_class`` is the one over all classes.

    Raises:
        CalibrationError: too few scores for a class to have a threshold of its own, and how
            many it would take; or a class has too many scores that are not finite.
        UsageError: the shapes differ, or a label is no class.
    """
    values, labels = as_float32(scores_N), np.asarray(labels_N)
    if values.shape != labels.shape or values.ndim != 1:
        raise UsageError(
            f"scores and predicted classes must both have shape [n], not {list(values.shape)} "
            f"and {list(labels.shape)}"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise UsageError(f"predicted classes must lie in 0 .. {len(classes) - 1}")
    if len(values) < promise.fewest:
        raise too_few(len(values), promise.fewest, str(promise))
    counts_K = np.bincount(labels, minlength=len(classes))
    pooled = _pooled(counts_K, promise.fewest)
    own = [i for i in range(len(classes)) if i not in pooled]
    if not own:
        raise _none(counts_K, classes, promise)
    share = _Share(len(values), len(own) + bool(pooled))
    thresholds = {
        classes[i]: _threshold(values[labels == i], promise, share, f"predicted as {classes[i]}")
        for i in own
    }
    pool = None
    if pooled:
        names = ", ".join(classes[i] for i in sorted(pooled))
        part = values[np.isin(labels, sorted(pooled))]
        pool = _threshold(part, promise, share, f"predicted as one of {names}")
    per_class = PerClass(
        classes=tuple(classes),
        fewest=promise.fewest,
        own=thresholds,
        pooled={classes[i]: int(counts_K[i]) for i in sorted(pooled)},
        pool=pool,
    )
    overall = threshold_of(as_scores(values), promise, _OVERALL)
    return gate_of(overall, promise, score, evidence, per_class)


def _pooled(counts_K: NDArray[np.int64], fewest: int) -> set[int]:
    """The classes with too few, and the least of the others while those are too few."""
    order = np.argsort(counts_K, kind="stable")
    short = int(np.sum(counts_K < fewest))
    while 0 < short < len(order) and counts_K[order[:short]].sum() < fewest:
        short += 1
    return set(order[:short].tolist())


def _none(
    counts_K: NDArray[np.int64], classes: Sequence[str], promise: Promise
) -> CalibrationError:
    most = np.argsort(-counts_K, kind="stable")[:3]
    named = ", ".join(f"{classes[i]} {counts_K[i]:,}" for i in most)
    return CalibrationError(
        f"no predicted class gets a threshold of its own: to promise {promise} it takes "
        f"{promise.fewest:,} images predicted as it, and as many as the classes with fewer "
        f"together; most were predicted as {named}",
        remedy="Use more held-out images, a larger rate, or one threshold over all classes",
    )


class _Share:
    """How many of its scores each of ``groups`` may store, by how many of the ``n`` it has."""

    def __init__(self, n: int, groups: int) -> None:
        self._n = n
        self._spare = max(0, STORED_SCORES - _OVERALL - _LEAST_STORED * groups)

    def of(self, n: int) -> int:
        return _LEAST_STORED + self._spare * n // self._n


def _threshold(
    scores_N: NDArray[np.float32], promise: Promise, share: _Share, what: str
) -> Threshold:
    try:
        return threshold_of(as_scores(scores_N), promise, share.of(len(scores_N)))
    except CalibrationError as error:
        raise CalibrationError(
            f"of the images {what}: {error.cause}", remedy=error.remedy
        ) from error
