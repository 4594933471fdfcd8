"""A graph being turned into steps: what is there so far, and how nodes are read."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.model import Model, Node
from moon.runtime.sparse.steps import Rows, Step, Tensor

__all__ = ["Names", "UnsupportedError", "Work", "fits", "flag", "names", "number", "sizes", "truth"]

# A tensor may be so large as it lies in memory, in bytes.
_MOST_BYTES = 1 << 30
_MOST_SIZE = 1 << 20


class UnsupportedError(Exception):
    """Why a node is not taken."""


class Names(TypedDict):
    """The names that every step has."""

    source: str
    target: str
    node: str


class Work:
    """What is known of a graph so far.

    Attributes:
        tensors: shapes by name, of what steps can read.
        constants: by name; those that can be fed are none.
        steps: in order.
        fixed: the number of images is part of the graph.
    """

    def __init__(self, model: Model, name: str, given: Tensor, fixed: bool) -> None:
        self.constants: dict[str, NDArray[Any]] = {
            key: value for key, value in model.constants.items() if key not in model.optional
        }
        self._bfloat16 = model.bfloat16
        self.tensors: dict[str, Tensor] = {name: given}
        self.steps: list[Step] = []
        self.fixed = fixed

    def tensor(self, name: str) -> Tensor:
        """The shape of what steps made."""
        if name not in self.tensors:
            raise UnsupportedError("its first input is constant")
        return self.tensors[name]

    def planes(self, name: str) -> Planes:
        """The same, of an image or feature map."""
        tensor = self.tensors.get(name)
        if not isinstance(tensor, Planes):
            raise UnsupportedError("it does not read an image")
        return tensor

    def rows(self, name: str) -> Rows:
        """The same, of features."""
        tensor = self.tensors.get(name)
        if not isinstance(tensor, Rows):
            raise UnsupportedError("it does not read features")
        return tensor

    def constant(self, name: str) -> NDArray[np.float32]:
        """Numbers of float32."""
        values = self.constants.get(name)
        if values is None:
            raise UnsupportedError("a weight is not constant")
        if values.dtype != np.float32 or name in self._bfloat16:
            kind = "bfloat16" if name in self._bfloat16 else values.dtype
            raise UnsupportedError(f"it computes in {kind}")
        return np.require(values, np.float32, ["C", "A"])

    def finite(self, name: str) -> NDArray[np.float32]:
        """The same, of weights: what is left out as zero would make NaN of infinity."""
        values = self.constant(name)
        if not np.isfinite(values).all():
            raise UnsupportedError("a weight is NaN or infinite")
        return values

    def whole(self, node: Node, at: int, attribute: str = "") -> tuple[int, ...] | None:
        """Integers from an input, or else from an attribute; None where there are none."""
        if at < len(node.inputs) and node.inputs[at]:
            values = self.constants.get(node.inputs[at])
            if values is None or values.dtype.kind not in "iu":
                raise UnsupportedError("its sizes or axes are not constant")
            return tuple(int(value) for value in values.reshape(-1))
        found: Any = node.attributes.get(attribute)
        if found is not None and not _integers(found):
            raise UnsupportedError(f"its {attribute} are no integers")
        return None if found is None else tuple(found)

    def add(self, step: Step, tensor: Tensor) -> None:
        """A step, and the shape of what it makes."""
        if not fits(tensor, self.fixed):
            raise UnsupportedError("its output is empty, or larger than 1 GiB")
        self.steps.append(step)
        self.tensors[step.target] = tensor


def fits(tensor: Tensor, fixed: bool) -> bool:
    """Whether a tensor is neither empty nor too large.

    By image, unless their number is fixed: what is taken must not depend on how many there are.
    """
    return 0 < (tensor if fixed else replace(tensor, images=1)).nbytes <= _MOST_BYTES


def names(node: Node, source: str = "") -> Names:
    """Of a step for a node that reads ``source``, or its first input."""
    return {"source": source or node.inputs[0], "target": node.outputs[0], "node": node.title}


def _integers(values: Any) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, int) for value in values)


def sizes(node: Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """An attribute of as many sizes as the default has."""
    values: Any = node.attributes.get(name, default)
    if not _integers(values) or len(values) != len(default):
        raise UnsupportedError(f"its {name} are not those of an image")
    if not all(0 <= value < _MOST_SIZE for value in values):
        raise UnsupportedError(f"its {name} are out of range")
    return tuple(values)


def flag(node: Node, name: str, default: int = 0) -> int:
    """An attribute that is an integer."""
    value = node.attributes.get(name, default)
    if not isinstance(value, int):
        raise UnsupportedError(f"its {name} is no integer")
    return value


def truth(node: Node, name: str, default: int = 0) -> bool:
    """An attribute that is 0 or 1: of other numbers operators think differently."""
    value = flag(node, name, default)
    if value not in (0, 1):
        raise UnsupportedError(f"its {name} is not 0 or 1")
    return bool(value)


def number(node: Node, name: str, default: float) -> float:
    """An attribute that is a number."""
    value = node.attributes.get(name, default)
    if not isinstance(value, float | int) or math.isnan(value):
        raise UnsupportedError(f"its {name} is no number")
    return float(value)
