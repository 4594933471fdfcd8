"""The weight of a convolution by its nonzeros."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.costs import Weights
from moon.runtime.sparse.geometry import Geometry

__all__ = ["ConvWeights"]

Ints = NDArray[np.int64]


class ConvWeights:
    """A weight [rows, channels / groups, kernel height, kernel width] by its nonzeros.

    Attributes:
        rows: output channels.
        taps: of the kernel.
        row, column: int64 [n]; a column is channel * taps + tap.
        value: float32 [n].
    """

    def __init__(self, weight: NDArray[np.float32], groups: int) -> None:
        rows, own = weight.shape[:2]
        self.rows, self.taps = rows, int(np.prod(weight.shape[2:]))
        flat = weight.reshape(rows, own * self.taps)
        self.row, within = np.nonzero(flat)
        self.value: NDArray[np.float32] = flat[self.row, within]
        self.column: Ints = within + self.row // (rows // groups) * own * self.taps

    def summary(self, geometry: Geometry) -> Weights:
        """What a plan needs to know."""
        return Weights.of(self.rows, self.row, self.column, self.pairs(geometry))

    def pairs(self, geometry: Geometry) -> Ints:
        """For every column its channel and the kind of its tap, as one number."""
        channels = int(self.column.max(initial=0)) // self.taps + 1
        kind, first = geometry.taps.kinds
        found: Ints = np.arange(channels)[:, None] * len(first) + kind
        return found.reshape(-1)
