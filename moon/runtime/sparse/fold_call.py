"""What the operators that are folded have in common: their arguments, and their limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError
from moon.runtime.sparse.node import Attribute

__all__ = ["Array", "Call", "Evaluate", "LeaveError", "too_much", "whole"]

Array: TypeAlias = "NDArray[Any]"


class LeaveError(Exception):
    """The node is left in the graph: its result depends on the runtime, or it is malformed."""


@dataclass(frozen=True)
class Call:
    """The arguments of one node.

    Attributes:
        inputs: None for one left out.
        opset: of ONNX's own operators.
        limit: of the result, in bytes.
    """

    inputs: tuple[Array | None, ...]
    attributes: Mapping[str, Attribute]
    opset: int
    limit: int

    def room(self, shape: Iterable[int], dtype: np.dtype[Any]) -> None:
        """Raise BackendError if an array of the shape takes more than the limit."""
        shape = tuple(shape)
        if min(shape, default=0) < 0:
            raise LeaveError
        if math.prod(dim for dim in shape if dim) * dtype.itemsize > self.limit:
            raise too_much(f"a constant of the shape {list(shape)}")

    def arrays(self, least: int, most: int | None = None) -> tuple[Array, ...]:
        """All inputs, none left out, ``least`` to ``most`` of them (as many as least)."""
        found = tuple(array for array in self.inputs if array is not None)
        if len(found) != len(self.inputs) or not least <= len(found) <= (most or least):
            raise LeaveError
        return found

    def alike(self, least: int, most: int | None = None) -> tuple[Array, ...]:
        """:meth:`arrays`, which are of one type."""
        found = self.arrays(least, most)
        if any(array.dtype != found[0].dtype for array in found):
            raise LeaveError
        return found

    def integer(self, name: str, default: int) -> int:
        value = self.attributes.get(name, default)
        if not isinstance(value, int):
            raise LeaveError
        return value

    def integers(self, name: str) -> tuple[int, ...] | None:
        value = self.attributes.get(name)
        if value is None:
            return None
        if not isinstance(value, tuple) or not all(isinstance(item, int) for item in value):
            raise LeaveError
        return tuple(int(item) for item in value)

    def axes(self, since: int) -> tuple[int, ...] | None:
        """The attribute axes before the opset ``since``, and the second input from then on."""
        if self.opset < since:
            self.arrays(1)
            return self.integers("axes")
        if self.attributes:
            raise LeaveError
        given = self.inputs[1] if len(self.inputs) > 1 else None
        return None if given is None else whole(given)


def too_much(what: str) -> BackendError:
    return BackendError(
        f"the ONNX file computes {what}, more than a file of its size could need",
        remedy="Run it with ONNX Runtime, if you trust it",
    )


Evaluate: TypeAlias = Callable[[Call], Array]


def whole(values: Array) -> tuple[int, ...]:
    """The values of a list of integers."""
    if values.ndim > 1 or values.dtype.kind != "i" or values.size > 64:
        raise LeaveError
    return tuple(map(int, values.reshape(-1)))
