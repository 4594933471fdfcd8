"""What goes into an engine and what comes out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from moon.calibrated import CALIBRATED
from moon.errors import BackendError
from moon.runtime.trt.api import Api
from moon.runtime.trt.batches import Profile

__all__ = ["Ports", "Tensor"]

_AGAIN = "Build the engine again, from this bundle"


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        name: in the graph.
        dtype: of its values.
        row: shape of one row, without the batch; of an input that has no rows, its shape.
    """

    name: str
    dtype: np.dtype[Any]
    row: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of one row."""
        return self.dtype.itemsize * math.prod(self.row)


@dataclass(frozen=True)
class Ports:
    """All of them, and how many rows they take.

    Attributes:
        image: the input of images.
        settings: inputs that are no images: what calibrating sets.
        outputs: in the engine's order.
        profile: how many rows at once.
    """

    image: Tensor
    settings: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    profile: Profile

    @classmethod
    def of(cls, engine: Any, api: Api) -> Ports:
        """Those of an ``ICudaEngine``.

        Raises:
            BackendError: it is not an engine of a bundle's graph; says how it differs.
        """
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        mode = api.trt.TensorIOMode
        inputs = [name for name in names if engine.get_tensor_mode(name) == mode.INPUT]
        outputs = [name for name in names if engine.get_tensor_mode(name) == mode.OUTPUT]
        images = [name for name in inputs if name not in CALIBRATED]
        if len(images) != 1:
            raise _bad(f"has the inputs {', '.join(inputs) or 'none'}, not one of images")
        return cls(
            _tensor(engine, api, images[0]),
            tuple(_tensor(engine, api, name, rows=False) for name in inputs if name not in images),
            tuple(_tensor(engine, api, name) for name in outputs),
            _profile(engine, images[0]),
        )


def _profile(engine: Any, image: str) -> Profile:
    rows = int(engine.get_tensor_shape(image)[0])
    if rows >= 1:
        return Profile(rows, rows, rows)
    return Profile(*(int(shape[0]) for shape in engine.get_tensor_profile_shape(image, 0)))


def _tensor(engine: Any, api: Api, name: str, *, rows: bool = True) -> Tensor:
    shape = tuple(int(one) for one in engine.get_tensor_shape(name))
    row = shape[1:] if rows else shape
    if (rows and not shape) or min(row, default=1) < 1:
        raise _bad(f"has {name} of the shape {list(shape)}, which is not of one size")
    if engine.get_tensor_location(name) != api.trt.TensorLocation.DEVICE:
        raise _bad(f"wants {name} in host memory")
    kind = engine.get_tensor_dtype(name)
    try:
        dtype = np.dtype(api.trt.nptype(kind))
    except TypeError as error:  # bfloat16 and smaller: NumPy has none of them
        raise _bad(f"has {name} in {kind}, which NumPy cannot hold") from error
    return Tensor(name, dtype, row)


def _bad(how: str) -> BackendError:
    return BackendError(f"the engine {how}", remedy=_AGAIN)
