"""Energy after scaling each feature vector by how concentrated it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moon.errors import UsageError
from moon.scores.fitted import Fitted, whole
from moon.scores.logits import Floats, logsumexp
from moon.scores.training import Ints, Training

__all__ = ["Scale", "fit_scale"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale(Fitted):
    """logsumexp over the known classes of W x exp(r) + b, with r = sum(x) / sum(top x).

    Xu, Chen, Franchi and Yao, "Scaling for Training Time and Post-hoc Out-of-distribution
    Detection Enhancement", ICLR 2024. "top x" are the largest entries of x; all entries, and not
    only these, are scaled. Meant for activations of at least 0; a zero vector is left as it is.

    Input: features [N, D]. Cost: O(N K D); constants K D numbers.

    Attributes:
        weight: rows of the known classes, [K, D].
        bias: [K].
        top: how many entries are the top, int64 [].
    """

    name = "scale"
    reads: ClassVar = ("features",)
    shapes: ClassVar = {"weight": "KD", "bias": "K", "top": ""}
    integers: ClassVar = frozenset({"top"})

    weight: Floats
    bias: Floats
    top: Ints

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top <= self.weight.shape[1]:
            raise UsageError(
                f"the top of the score scale must be 1 to {self.weight.shape[1]} features, "
                f"not {self.top}"
            )

    def _score(self, x_BD: Floats, z_BL: Floats) -> Floats:
        width = x_BD.shape[1]
        ordered = np.partition(x_BD, width - int(self.top), axis=1)
        top_B = ordered[:, width - int(self.top) :].sum(axis=1)
        empty_B = ~x_BD.any(axis=1)
        ratio_B = np.where(empty_B, 1.0, x_BD.sum(axis=1) / top_B)
        return logsumexp((x_BD * np.exp(ratio_B)[:, None]) @ self.weight.T + self.bias)


def fit_scale(training: Training, *, percentile: float = 85.0) -> Scale:
    """Takes the last layer; nothing is computed from images.

    Args:
        percentile: share of the features below the top, in percent; the paper's and OpenOOD's 85.
            The top are D - round(D percentile / 100) features, as in the authors' code.

    Raises:
        UsageError: the last layer is missing, or the percentile leaves no feature.
    """
    weight, bias = training.known_head("scale")
    width = weight.shape[1]
    if not 0 <= percentile < 100:
        raise UsageError(f"the percentile of scale must be from 0 to below 100, not {percentile}")
    top = width - int(np.round(width * percentile / 100))
    if top < 1:
        raise UsageError(
            f"the percentile {percentile} leaves none of {width} features for the score scale",
            remedy="Choose a smaller percentile",
        )
    return Scale(weight=weight, bias=bias, top=whole(top))
