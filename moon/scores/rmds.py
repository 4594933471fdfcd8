"""Relative Mahalanobis distance: to the nearest class, less that to all training features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moon.errors import UsageError
from moon.scores.fdbd import mean_feature
from moon.scores.fitted import Fitted
from moon.scores.logits import Floats
from moon.scores.training import Training, rows

__all__ = ["Rmds", "fit_rmds"]

RTOL = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rmds(Fitted):
    """-min over c of (x - mu_c)' P (x - mu_c) + (x - mu)' P0 (x - mu).

    Ren et al., "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", 2021.
    mu_c are the class means and P the inverse of their shared covariance
    (both by label), mu and P0 those of all training features. The inverses are kept as whitening
    matrices A with P = A A', so that squares of differences are summed and stay accurate.

    Input: features [N, D]. Cost: O(N D (R + S + K)); constants D (R + S) + K R numbers.

    Attributes:
        centre: mu, [D].
        whiten: A of the shared covariance, [D, R]; R is its rank.
        means: (mu_c - mu) A, [K, R].
        whiten_all: A of the covariance of all features, [D, S].
    """

    name = "rmds"
    reads: ClassVar = ("features",)
    shapes: ClassVar = {"centre": "D", "whiten": "DR", "means": "KR", "whiten_all": "DS"}

    centre: Floats
    whiten: Floats
    means: Floats
    whiten_all: Floats

    def _score(self, x_BD: Floats, z_BL: Floats) -> Floats:
        away_BD = x_BD - self.centre
        white_BR = away_BD @ self.whiten
        to_class_BK = (
            (white_BR**2).sum(axis=1, keepdims=True)
            - 2 * white_BR @ self.means.T
            + (self.means**2).sum(axis=1)
        )
        to_all_B = ((away_BD @ self.whiten_all) ** 2).sum(axis=1)
        score: Floats = to_all_B - to_class_BK.min(axis=1)
        return score


def fit_rmds(training: Training, *, rtol: float | None = None) -> Rmds:
    """Class means and the two covariances, from training features and their labels.

    A singular covariance (dead features, fewer images than features) is pseudo-inverted, as in
    OpenOOD (scikit-learn): directions whose variance is below ``rtol`` of the largest are left
    out, and differences along them cost nothing.

    Args:
        rtol: None is D times the float32 epsilon, OpenOOD's.

    Raises:
        UsageError: no features or labels, a class without images, or features that do not vary.
    """
    features = training.need("features", "rmds")
    labels = training.need("labels", "rmds")
    centre = mean_feature(training, "rmds")
    means = _class_means(training, centre)
    within = np.zeros((len(centre), len(centre)))
    overall = np.zeros_like(within)
    for here in rows(len(features)):
        away = features[here].astype(np.float64) - centre
        overall += away.T @ away
        away -= means[labels[here]]
        within += away.T @ away
    limit = len(centre) * RTOL if rtol is None else rtol
    whiten = _whitening(within / len(features), limit, "within the classes")
    return Rmds(
        centre=centre,
        whiten=whiten,
        means=means @ whiten,
        whiten_all=_whitening(overall / len(features), limit, "at all"),
    )


def _class_means(training: Training, centre_D: Floats) -> Floats:
    """mu_c - mu: [K, D]."""
    features, labels = training.need("features", "rmds"), training.need("labels", "rmds")
    # The labels alone tell the number of classes where neither logits nor head is given.
    told = training.logits is not None or training.weight is not None
    classes = len(training.known) if told else int(labels.max()) + 1
    counts = np.bincount(labels, minlength=classes)
    missing = np.flatnonzero(counts == 0)
    if len(missing):
        raise UsageError(
            f"the score rmds needs images of every class, and none has the label "
            f"{', '.join(map(str, missing[:5].tolist()))}{' and others' * (len(missing) > 5)}",
            remedy="Give images of all classes, or choose another score",
        )
    sums = np.zeros((classes, features.shape[1]))
    for here in rows(len(features)):
        np.add.at(sums, labels[here], features[here].astype(np.float64) - centre_D)
    means: Floats = sums / counts[:, None]
    return means


def _whitening(covariance_DD: Floats, rtol: float, where: str) -> Floats:
    """A with A A' the pseudo-inverse: [D, rank]."""
    values, vectors = np.linalg.eigh(covariance_DD)
    kept = values > rtol * values[-1]
    if not kept.any():
        raise UsageError(
            f"the features do not vary {where}, so that the score rmds has no covariance",
            remedy="Give more images of each class",
        )
    whitening: Floats = vectors[:, kept] / np.sqrt(values[kept])
    return whitening
