"""How good the known-class answers are: accuracy, calibration, and risk against coverage.

Confidences and correctness are arrays [N] over the same inputs. Every rate is in [0, 1].
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moon.errors import UsageError
from moon.evaluation.metrics import Floats, Ints, tie_ends, vector

__all__ = [
    "Reliability",
    "accuracy",
    "aurc",
    "coverage_at_risk",
    "ece",
    "reliability",
    "risk_coverage",
]

BINS = 15


@dataclasses.dataclass(frozen=True, eq=False)
class Reliability:
    """Confidence against accuracy in equal-width bins.

    Attributes:
        edges: bin edges from 0 to 1, [B + 1]; a bin holds its lower edge, the last also 1.0.
        counts: inputs in each bin, [B].
        confidence: mean confidence in each bin, NaN where it is empty, [B].
        accuracy: share of right answers in each bin, NaN where it is empty, [B].
    """

    edges: Floats
    counts: Ints
    confidence: Floats
    accuracy: Floats

    @property
    def ece(self) -> float:
        """Mean distance of accuracy from confidence, weighted by the bins' shares."""
        filled = self.counts > 0
        gaps = np.abs(self.accuracy[filled] - self.confidence[filled])
        return float(np.sum(gaps * self.counts[filled]) / self.counts.sum())


def reliability(confidence: ArrayLike, correct: ArrayLike, *, bins: int = BINS) -> Reliability:
    """Bin the confidences.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; here the last
    bin is closed, so that a confidence of exactly 1.0 counts.

    Raises:
        UsageError: confidences outside [0, 1], lengths that differ, or fewer than one bin.
    """
    confidence, correct = _paired(confidence, correct)
    if bins < 1:
        raise UsageError(f"reliability needs at least one bin, got {bins}")
    if confidence.min() < 0 or confidence.max() > 1:
        raise UsageError(
            f"confidences must lie in [0, 1], got {confidence.min():g} to {confidence.max():g}"
        )
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.minimum(np.searchsorted(edges, confidence, side="right") - 1, bins - 1)
    counts = np.bincount(index, minlength=bins).astype(np.int64)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(index, weights=confidence, minlength=bins) / counts
        mean_correct = np.bincount(index, weights=correct, minlength=bins) / counts
    return Reliability(edges, counts, mean_confidence, mean_correct)


def ece(confidence: ArrayLike, correct: ArrayLike, *, bins: int = BINS) -> float:
    """Expected calibration error; see ``reliability``."""
    return reliability(confidence, correct, bins=bins).ece


def accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Share of predictions [N] that equal the labels [N]."""
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or predicted.ndim != 1 or predicted.size == 0:
        raise UsageError(
            f"accuracy needs two non-empty arrays [N], got {predicted.shape} and {labels.shape}"
        )
    return float(np.mean(predicted == labels))


def risk_coverage(scores: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    """Error among the accepted against the share accepted, at each distinct threshold.

    Returns:
        coverage [T] ascending to 1, and risk [T]; inputs that tie are accepted together.

    Source: El-Yaniv & Wiener, "On the Foundations of Noise-free Selective Classification",
    JMLR 11, 2010.
    """
    coverage, risk, _ = _risks(scores, correct)
    return coverage, risk


def aurc(scores: ArrayLike, correct: ArrayLike) -> float:
    """Area under risk-coverage: the mean over inputs of the risk at their own score.

    Source: Geifman, Uziel & El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural
    Classifiers", ICLR 2019.
    """
    _, risk, counts = _risks(scores, correct)
    return float(np.sum(risk * counts) / counts.sum())


def coverage_at_risk(scores: ArrayLike, correct: ArrayLike, risk: float) -> float:
    """The largest share that can be accepted with an error of at most ``risk`` among it.

    Measured on these very inputs, with no guarantee for others; 0 where none will do.
    """
    if not 0 <= risk <= 1:
        raise UsageError(f"a risk must lie in [0, 1], got {risk:g}")
    coverage, risks, _ = _risks(scores, correct)
    allowed = coverage[risks <= risk]
    return float(allowed[-1]) if len(allowed) else 0.0


def _risks(scores: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats, Ints]:
    scores, correct = _paired(scores, correct)
    order = np.argsort(scores)[::-1]
    ends = tie_ends(scores[order])
    accepted = ends + 1
    wrong = np.cumsum(1.0 - correct[order])[ends]
    return accepted / len(scores), wrong / accepted, np.diff(accepted, prepend=0)


def _paired(values: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    floats = vector(values, "scores")
    right: NDArray[np.bool_] = np.asarray(correct).astype(bool)
    if right.shape != floats.shape:
        raise UsageError(
            f"scores and correctness must be of one length, got {floats.shape} and {right.shape}"
        )
    return floats, right.astype(np.float64)
