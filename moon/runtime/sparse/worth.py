"""Whether running a part of a network here is worth it: by what its zeros save.

Counted in multiply-adds, never measured, so that the same model is run the same way everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.steps import Conv, Linear, Rows, Step, Tensor

__all__ = ["LEAST_SAVED", "LITTLE", "MOST_LEFT", "SAVED_EACH", "Effort", "pays", "shortfall"]

# A model with a larger share of its multiply-adds left is run by ONNX Runtime as a whole.
MOST_LEFT = 0.8
# Or one that saves fewer for an image: kernels take a microsecond each to begin, and numbers some
# to be handed to and fro, when ONNX Runtime would be done.
LEAST_SAVED = 4_000_000
# Multiply-adds that must be saved for every number handed to a part or out of it: what it takes to
# copy one, and to wait for the other runtime, in the time of multiply-adds.
SAVED_EACH = 32
# Why a part is left to ONNX Runtime that does not save them.
LITTLE = "zeros save less there than it takes to hand numbers to and fro"


@dataclass(frozen=True)
class Effort:
    """Multiply-adds of the convolutions and linear layers of one image.

    Attributes:
        dense: of all weights.
        left: of weights that are not zero.
    """

    dense: int = 0
    left: int = 0

    @classmethod
    def of(cls, steps: Iterable[Step], tensors: Mapping[str, Tensor]) -> Effort:
        """Of steps, whose tensors have these shapes."""
        dense = left = 0
        for step in steps:
            if isinstance(step, (Conv, Linear)):
                made = tensors[step.target]
                places = made.height * made.width if isinstance(made, Planes) else 1
                dense += places * step.weight.size
                left += places * int(np.count_nonzero(step.weight))
        return cls(dense, left)

    @property
    def saved(self) -> int:
        """Of weights that are zero."""
        return self.dense - self.left

    def __add__(self, other: Effort) -> Effort:
        return Effort(self.dense + other.dense, self.left + other.left)


def _numbers(tensor: Tensor) -> int:
    """Numbers of one image in a tensor."""
    if isinstance(tensor, Rows):
        return tensor.features
    return tensor.channels * tensor.height * tensor.width


def pays(effort: Effort, crossing: Sequence[Tensor]) -> bool:
    """Whether a part saves more than it costs to hand it these tensors and take them from it."""
    return effort.saved >= SAVED_EACH * sum(map(_numbers, crossing))


def shortfall(effort: Effort) -> str:
    """Why ONNX Runtime should rather run the whole model; "" where it should not."""
    if not effort.dense:
        return "it has no convolution that the engine runs"
    if effort.left > MOST_LEFT * effort.dense:
        share = effort.left / effort.dense
        return f"{share:.0%} of its multiply-adds are left, too many to gain by leaving out zeros"
    if effort.saved < LEAST_SAVED:
        return f"it is so small that leaving out zeros saves only {effort.saved:,} multiply-adds"
    return ""
