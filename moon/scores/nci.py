"""Neural collapse: nearness to the answer's weight vector, and the feature's size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moon.errors import UsageError
from moon.scores.fdbd import FLOOR, mean_feature
from moon.scores.fitted import Fitted, real, whole
from moon.scores.logits import Floats
from moon.scores.training import Ints, Training

__all__ = ["Nci", "fit_nci"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Nci(Fitted):
    """<w_y, x - mu> / ||x - mu|| + alpha ||x||_1.

    Liu and Qin, "Detecting Out-of-Distribution through the Lens of Neural Collapse", CVPR 2025.
    y is the known class with the largest logit, w_y its row of the last layer, mu
    the mean training feature. At mu itself the first term is 0.

    Input: features [N, D] and logits [N, L]. Cost: O(N D); constants K D numbers.

    Attributes:
        weight: rows of the known classes, [K, D].
        centre: mu, [D].
        alpha: weight of the feature's size, [].
        known: logits of the known classes, int64 [K].
        outputs: L, int64 [].
    """

    name = "nci"
    reads: ClassVar = ("features", "logits")
    shapes: ClassVar = {"weight": "KD", "centre": "D", "alpha": "", "known": "K", "outputs": ""}

    weight: Floats
    centre: Floats
    alpha: Floats
    known: Ints
    outputs: Ints

    def _score(self, x_BD: Floats, z_BL: Floats) -> Floats:
        answer_B = z_BL[:, self.known].argmax(axis=1)
        away_BD = x_BD - self.centre
        towards_B = np.einsum("bd,bd->b", self.weight[answer_B], away_BD)
        distance_B = np.maximum(np.linalg.norm(away_BD, axis=1), FLOOR)
        score: Floats = towards_B / distance_B + self.alpha * np.abs(x_BD).sum(axis=1)
        return score


def fit_nci(training: Training, *, alpha: float = 1e-4) -> Nci:
    """The mean training feature, and the last layer.

    Args:
        alpha: OpenOOD v1.5's 0.0001; it tries 0.001, 0.01 and 0.1 on validation data too.

    Raises:
        UsageError: an input is missing, or alpha is negative.
    """
    if not 0 <= alpha < np.inf:
        raise UsageError(f"alpha of nci must be 0 or a positive number, not {alpha}")
    centre = mean_feature(training, "nci")
    weight, _ = training.known_head("nci")
    return Nci(
        weight=weight,
        centre=centre,
        alpha=real(alpha),
        known=training.known,
        outputs=whole(training.outputs),
    )
