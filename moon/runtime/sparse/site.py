"""Where the steps of a program read and write, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.frames import Record
from moon.runtime.sparse.kernels import PLANE_KERNELS
from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.memory import Arena, Space
from moon.runtime.sparse.steps import Rows, Tensor

__all__ = ["Operation", "Site", "operation"]


@dataclass(frozen=True)
class Operation:
    """A call of the driver.

    Attributes:
        kernel: its name.
        build: writes it into a module.
        record: what it reads.
        meet: nothing behind it begins before all up to it is done.
        step: what it is part of.
    """

    kernel: str
    build: Callable[[Any], None]
    record: Record
    meet: bool
    step: str


def operation(kernel: str, record: Record, step: str, *, meet: bool = True) -> Operation:
    """A call of one of ``PLANE_KERNELS``."""
    build = PLANE_KERNELS[kernel]
    return Operation(kernel, lambda module: build(module, kernel), record, meet, step)


class Site:
    """Shapes and places of tensors.

    Args:
        tensors: shapes by name.
        arena: their memory.
        space: gives memory for tables.
    """

    def __init__(self, tensors: Mapping[str, Tensor], arena: Arena, space: Space) -> None:
        self.tensors, self._arena, self._space = tensors, arena, space

    def at(self, name: str) -> NDArray[np.float32]:
        """A tensor's memory."""
        return self._arena.floats(name)

    def planes(self, name: str) -> Planes:
        """The shape of a tensor that is planes."""
        tensor = self.tensors[name]
        if not isinstance(tensor, Planes):
            raise ValueError(f"{name} is no planes")
        return tensor

    def rows(self, name: str) -> Rows:
        """The shape of a tensor that is rows."""
        tensor = self.tensors[name]
        if not isinstance(tensor, Rows):
            raise ValueError(f"{name} is no rows")
        return tensor

    def table(self, array: NDArray[Any]) -> NDArray[Any]:
        """Numbers for kernels to read."""
        return self._space.table(array)
