"""Scores as values: named constant arrays, and confidences computed with them.

Shapes: N inputs, D features, L logits, K known classes; B rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moon.errors import UsageError
from moon.scores.logits import Floats
from moon.scores.training import Ints, rows

__all__ = ["Fitted", "FittedScore", "real", "whole"]

Array = NDArray[Any]
F = TypeVar("F", bound="Fitted")

ROWS = 512


class FittedScore(Protocol):
    """A score with its constants; higher is more in-distribution."""

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]

    @property
    def nbytes(self) -> int:
        """Bytes of the constants."""
        ...

    def to_arrays(self) -> dict[str, Array]:
        """The constants by name; :func:`moon.scores.restore_score` is the way back."""
        ...

    def score(self, features: ArrayLike | None = None, logits: ArrayLike | None = None) -> Floats:
        """Features [N, D] and logits [N, L] -> confidence [N]."""
        ...


class Fitted:
    """A frozen dataclass of arrays that scores rows; the scores of this package extend it.

    Class attributes:
        name: of the score.
        reads: which of ``features`` and ``logits`` it scores.
        shapes: field -> dimensions, a letter each; the same letter is the same size
            everywhere. A field ``outputs`` holds L, and a field ``known`` columns of the logits.
        integers: the fields that are int64; the others are float64 or float32.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    shapes: ClassVar[Mapping[str, str]]
    integers: ClassVar[frozenset[str]] = frozenset({"outputs", "known"})

    _sizes: dict[str, int]

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        for field in fields(self):  # type: ignore[arg-type]
            array = self._constant(field.name, getattr(self, field.name), sizes)
            object.__setattr__(self, field.name, array)
            if field.name == "outputs":
                sizes["L"] = int(array)
        object.__setattr__(self, "_sizes", sizes)
        known = getattr(self, "known", None)
        if known is not None and not (
            (known >= 0).all()
            and (known < sizes["L"]).all()
            and len(set(known.tolist())) == len(known)
        ):
            raise UsageError(
                f"the known logits of the score {self.name} are not columns of its own"
            )

    def _constant(self, name: str, value: ArrayLike, sizes: dict[str, int]) -> Array:
        array = np.array(value)
        letters = self.shapes[name]
        shown = f"the constant {name} of the score {self.name}"
        kinds = (np.int64,) if name in self.integers else (np.float64, np.float32)
        if array.dtype not in kinds:
            wanted = " or ".join(np.dtype(kind).name for kind in kinds)
            raise UsageError(f"{shown} must be {wanted}, not {array.dtype}")
        if array.ndim != len(letters):
            raise UsageError(
                f"{shown} must have shape [{', '.join(letters)}], not {list(array.shape)}"
            )
        for letter, size in zip(letters, array.shape, strict=True):
            if size == 0 or sizes.setdefault(letter, size) != size:
                raise UsageError(
                    f"{shown} has shape {list(array.shape)}, and {letter} is not "
                    f"{sizes.get(letter, 'positive')} there"
                )
        if not np.isfinite(array).all():
            raise UsageError(f"{shown} holds NaN or infinite values")
        array.flags.writeable = False
        return array

    @property
    def nbytes(self) -> int:
        """Bytes of the constants."""
        return sum(array.nbytes for array in self.to_arrays().values())

    def to_arrays(self) -> dict[str, Array]:
        """The constants by name, read-only; scalars have shape []."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_arrays(cls: type[F], arrays: Mapping[str, ArrayLike]) -> F:
        """The score with these constants.

        Raises:
            UsageError: a constant is missing, unknown, or of another shape or type.
        """
        if set(arrays) != set(cls.shapes):
            raise UsageError(
                f"the score {cls.name} has the constants {', '.join(cls.shapes)}, "
                f"not {', '.join(arrays) or 'none'}"
            )
        return cls(**arrays)

    def score(self, features: ArrayLike | None = None, logits: ArrayLike | None = None) -> Floats:
        """Confidence of each input, computed in blocks of rows.

        Args:
            features: [N, D]; needed where ``reads`` names it, else ignored.
            logits: [N, L]; needed where ``reads`` names it, else ignored.

        Returns:
            [N] float64, higher more in-distribution; NaN for a row with a NaN or infinite input.

        Raises:
            UsageError: an input is missing or of another shape.
        """
        given = {"features": features, "logits": logits}
        read = {name: self._input(name, given[name]) for name in self.reads}
        counts = {name: len(array) for name, array in read.items()}
        if len(set(counts.values())) > 1:
            raise UsageError(
                f"features and logits must be of the same inputs, not of {counts['features']} "
                f"and {counts['logits']}"
            )
        score_N = np.empty(next(iter(counts.values())))
        for here in rows(len(score_N), ROWS):
            parts = {name: array[here].astype(np.float64) for name, array in read.items()}
            usable = np.ones(here.stop - here.start, dtype=bool)
            for part in parts.values():
                usable &= np.isfinite(part).all(axis=1)
            with np.errstate(all="ignore"):
                found = self._score(parts.get("features", _NONE), parts.get("logits", _NONE))
            score_N[here] = np.where(usable, found, np.nan)
        return score_N

    def _input(self, name: str, value: ArrayLike | None) -> Array:
        if value is None:
            raise UsageError(
                f"the score {self.name} reads {' and '.join(self.reads)}, and no {name} are given"
            )
        array: Array = np.asarray(value)
        width = self._sizes["D" if name == "features" else "L"]
        if array.ndim != 2 or array.shape[1] != width:
            raise UsageError(
                f"the score {self.name} reads {name} of shape [N, {width}], not {list(array.shape)}"
            )
        return array

    def _score(self, x_BD: Floats, z_BL: Floats) -> Floats:
        """Float64 rows -> confidence [B], each from its row alone; what is not read is empty."""
        raise NotImplementedError


_NONE: Floats = np.empty((0, 0))


def whole(value: int) -> Ints:
    """An int64 scalar array."""
    return np.array(value, dtype=np.int64)


def real(value: float) -> Floats:
    """A float64 scalar array."""
    return np.array(value, dtype=np.float64)
