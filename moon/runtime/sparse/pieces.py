"""How many images of a larger batch are run at a time.

Together they share the weights that are read and fill vectors better; and what lies between two
steps grows, out of one cache after the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from moon.runtime.sparse.costs import SAVED
from moon.runtime.sparse.ir import LANES
from moon.runtime.sparse.program import Program
from moon.runtime.sparse.steps import Step, Tensor

__all__ = ["MOST", "together"]

MOST = 16
# Cycles, fitted on Zen 4 to six networks at 70 to 99% sparsity: a byte of the weights, a byte of
# activations for every doubling beyond the second-level cache, a multiply-add of a vector.
_WEIGHT_BYTE = 0.12
_DOUBLING = 0.03
_MULTIPLY = 1.05
_SECOND_LEVEL = 1 << 20
# A value and its offset.
_NONZERO_BYTES = 6


def together(steps: Sequence[Step], tensors: Mapping[str, Tensor], program: Program) -> int:
    """A power of two, at most `MOST`: the cheapest for each image.

    Args:
        steps: of one image.
        tensors: their shapes.
        program: for one image.
    """
    each = [sum(tensors[n].nbytes for n in {*step.reads, step.target}) for step in steps]
    convolutions = [(c.nbytes, c.written.pixels) for c, _ in program.convolutions.values()]

    def cost(images: int) -> float:
        weights = sum(nbytes for nbytes, _ in convolutions) / images
        doublings = math.log2(1 + images * max(each) / _SECOND_LEVEL)
        vectors = sum(
            nbytes / _NONZERO_BYTES * _vectors(pixels * images) / images
            for nbytes, pixels in convolutions
        )
        return _WEIGHT_BYTE * weights + _DOUBLING * doublings * sum(each) + _MULTIPLY * vectors

    return min((1 << i for i in range(MOST.bit_length())), key=cost)


def _vectors(pixels: int) -> float:
    """What a plane costs, a whole vector counted as one: of the last a part may do."""
    rest = pixels % LANES
    part = 1 - next(saved for lanes, saved in sorted(SAVED.items()) if rest <= lanes)
    return pixels // LANES + (part if rest else 0)
