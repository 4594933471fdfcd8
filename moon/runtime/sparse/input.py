"""What a model must be fed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import UsageError

__all__ = ["Input", "dtype_of", "finite"]

_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    **{
        f"tensor({name})": np.dtype(name)
        for name in (
            "float16", "uint8", "int8", "uint16", "int16", "int32", "int64", "uint32", "uint64",
            "bool",
        )
    },
}  # fmt: skip


def dtype_of(kind: str) -> np.dtype[Any] | None:
    """The type that ONNX Runtime calls so, such as ``tensor(float)``; None where numpy has none."""
    return _TYPES.get(kind)


def finite(x: NDArray[Any]) -> bool:
    """Whether all numbers of an array are finite; of the ways to ask, the quickest for a few."""
    return bool(np.isfinite(x).tobytes().find(0) < 0)


@dataclass(frozen=True)
class Input:
    """An input.

    Attributes:
        dtype: None for one that numpy lacks.
        shape: sizes, None for one that varies; None as a whole where nothing is known.
        optional: it need not be fed, and is no image: its numbers may be anything.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | None, ...] | None
    optional: bool = False

    @property
    def is_image(self) -> bool:
        """Whether it is what a bundle's graph takes."""
        kinds = (np.dtype(np.float32), np.dtype(np.uint8))
        return self.dtype in kinds and self.shape is not None and len(self.shape) == 4

    def check(self, x: NDArray[Any]) -> None:
        """Whether it can be fed.

        Raises:
            UsageError: another type or shape, or NaN or infinity in it.
        """
        if self.dtype is not None and x.dtype != self.dtype:
            raise self._refused(x)
        if self.shape is not None:
            self._check_shape(x, self.shape)
        if not self.optional and x.dtype.kind == "f" and not finite(x):
            raise UsageError(f"the input {self.name} holds NaN or infinite values")

    def _check_shape(self, x: NDArray[Any], shape: tuple[int | None, ...]) -> None:
        if x.shape[1:] != shape[1:]:
            fits = x.ndim == len(shape) and all(
                wanted in (None, got) for wanted, got in zip(shape[1:], x.shape[1:], strict=True)
            )
            if not fits:
                raise self._refused(x)
        if bool(x.ndim) != bool(shape):
            raise self._refused(x)
        if shape and shape[0] not in (None, x.shape[0]):
            if self.optional:
                raise self._refused(x)
            raise UsageError(f"the model is for {shape[0]} images at a time, not {len(x)}")

    def __str__(self) -> str:
        """Its type and shape."""
        if self.shape is None:
            return f"{self.dtype}"
        sizes = ["?" if size is None else str(size) for size in self.shape]
        if sizes and sizes[0] == "?" and not self.optional:
            sizes[0] = "N"
        return f"{self.dtype} [{', '.join(sizes)}]"

    def _refused(self, x: NDArray[Any]) -> UsageError:
        return UsageError(f"the input {self.name} must be {self}, not {x.dtype} {list(x.shape)}")
