"""What many programs of one network share, so that a tuner need not make it again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from moon.runtime.sparse.conv_weights import ConvWeights
from moon.runtime.sparse.convolution import Convolution
from moon.runtime.sparse.plan import Plan

__all__ = ["Kept"]


@dataclass
class Kept:
    """Of one number of images.

    Attributes:
        weights: by what convolutions make.
        convolutions: by that and their plan.
    """

    weights: dict[str, ConvWeights] = field(default_factory=dict)
    convolutions: dict[tuple[str, Plan], Convolution] = field(default_factory=dict)

    def only(self, wanted: Iterable[tuple[str, Plan]]) -> None:
        """Forget all other convolutions: each holds its weights, encoded."""
        left = {key: self.convolutions[key] for key in wanted if key in self.convolutions}
        self.convolutions = left
