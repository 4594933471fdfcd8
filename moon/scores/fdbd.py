"""Distance to the decision boundaries, relative to that to the mean training feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moon.errors import UsageError
from moon.scores.fitted import Fitted, whole
from moon.scores.logits import Floats
from moon.scores.training import Ints, Training, blocks

__all__ = ["Fdbd", "fit_fdbd", "mean_feature"]

FLOOR = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Fdbd(Fitted):
    """Mean over known c != y of (z_y - z_c) / ||w_y - w_c||, divided by ||x - mu||.

    Liu and Qin, "Fast Decision Boundary based Out-of-Distribution Detector", ICML 2024. y
    is the known class with the largest logit, mu the mean training feature. Only boundaries
    between known classes count. At mu itself the distance is taken as 1e-12.

    Input: features [N, D] and logits [N, L]. Cost: O(N (D + K)); constants K^2 + D numbers.

    Attributes:
        centre: mu, [D].
        gaps: ||w_a - w_c||, [K, K], its diagonal 1.
        known: logits of the known classes, int64 [K].
        outputs: L, int64 [].
    """

    name = "fdbd"
    reads: ClassVar = ("features", "logits")
    shapes: ClassVar = {"centre": "D", "gaps": "KK", "known": "K", "outputs": ""}

    centre: Floats
    gaps: Floats
    known: Ints
    outputs: Ints

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.gaps > 0).all():
            raise UsageError("the gaps of the score fdbd must be positive")

    def _score(self, x_BD: Floats, z_BL: Floats) -> Floats:
        z_BK = z_BL[:, self.known]
        answer_B = z_BK.argmax(axis=1)
        margins_BK = z_BK.max(axis=1, keepdims=True) - z_BK
        boundary_B = (margins_BK / self.gaps[answer_B]).sum(axis=1) / (len(self.known) - 1)
        distance_B = np.linalg.norm(x_BD - self.centre, axis=1)
        score: Floats = boundary_B / np.maximum(distance_B, FLOOR)
        return score


def fit_fdbd(training: Training) -> Fdbd:
    """The mean training feature and the distances between the last layer's rows.

    Raises:
        UsageError: an input is missing, there is one known class only, or two known classes
            have the same weights, and so no boundary.
    """
    centre = mean_feature(training, "fdbd")
    weight, _ = training.known_head("fdbd")
    if len(weight) < 2:
        raise UsageError("the score fdbd needs at least two known classes")
    gaps = np.stack([np.linalg.norm(weight - row, axis=1) for row in weight])
    np.fill_diagonal(gaps, 1.0)
    if not gaps.all():
        one, other = np.argwhere(gaps == 0)[0].tolist()
        raise UsageError(
            f"classes {one} and {other} have the same weights, so that fdbd finds no boundary "
            "between them",
            remedy="Choose another score",
        )
    return Fdbd(centre=centre, gaps=gaps, known=training.known, outputs=whole(training.outputs))


def mean_feature(training: Training, score: str) -> Floats:
    """Mean of the training features: [D] float64."""
    features = training.need("features", score)
    total: Floats = np.zeros(features.shape[1])
    for part in blocks(features):
        total += part.sum(axis=0)
    return total / len(features)
