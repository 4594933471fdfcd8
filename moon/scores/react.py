"""Energy after clipping large activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moon.errors import UsageError
from moon.scores.fitted import Fitted, real
from moon.scores.logits import Floats, logsumexp
from moon.scores.training import Training

__all__ = ["React", "fit_react"]


@dataclass(frozen=True, kw_only=True, eq=False)
class React(Fitted):
    """logsumexp over the known classes of W min(x, c) + b.

    Sun, Guo and Li, "ReAct: Out-of-distribution Detection With Rectified Activations", NeurIPS
    2021.

    Input: features [N, D]. Cost: O(N K D); constants K D numbers.

    Attributes:
        weight: rows of the known classes, [K, D].
        bias: [K].
        clip: c, [].
    """

    name = "react"
    reads: ClassVar = ("features",)
    shapes: ClassVar = {"weight": "KD", "bias": "K", "clip": ""}

    weight: Floats
    bias: Floats
    clip: Floats

    def _score(self, x_BD: Floats, z_BL: Floats) -> Floats:
        return logsumexp(np.minimum(x_BD, self.clip) @ self.weight.T + self.bias)


def fit_react(training: Training, *, percentile: float = 90.0) -> React:
    """c, the percentile of all training activations. Makes one copy of the features.

    Args:
        percentile: the paper's and OpenOOD's 90.

    Raises:
        UsageError: an input is missing, or the percentile is not between 0 and 100.
    """
    if not 0 < percentile <= 100:
        raise UsageError(f"the percentile of react must be above 0 to 100, not {percentile}")
    features = training.need("features", "react")
    weight, bias = training.known_head("react")
    clip = float(np.percentile(features.flatten(), percentile, overwrite_input=True))
    return React(weight=weight, bias=bias, clip=real(clip))
