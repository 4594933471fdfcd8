"""What the constants of scores are computed from: a model's answers to known images.

Shapes: N images, D features (what the last linear layer reads), L logits, K known classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moon.errors import UsageError
from moon.scores.logits import Floats

__all__ = ["Training", "blocks", "known_columns"]

Ints = NDArray[np.int64]

ROWS = 1024
SHAPES = {"features": "ND", "logits": "NL", "labels": "N", "weight": "LD", "bias": "L"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """Outputs of a model for images of its known classes, and its last linear layer.

    Each score needs some of these (``ScoreSpec.fits``); the others may be left out. Arrays
    keep their type, so that float32 features are not copied.

    Attributes:
        features: [N, D], the input of the last linear layer.
        logits: [N, L].
        labels: int [N], number of the known class, from 0 to K - 1.
        weight: [L, D] of the last linear layer, one row a logit.
        bias: [L] of the last linear layer; None is no bias.
        unknown_index: logit of the unknown class, or None.

    Raises:
        UsageError: shapes that do not fit together, NaN or infinite values, labels that are
            not known classes, or an ``unknown_index`` outside the logits.
    """

    features: ArrayLike | None = None
    logits: ArrayLike | None = None
    labels: ArrayLike | None = None
    weight: ArrayLike | None = None
    bias: ArrayLike | None = None
    unknown_index: int | None = None

    def __post_init__(self) -> None:
        for name, letters in SHAPES.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _checked(name, letters, getattr(self, name)))
        _check_sizes({name: getattr(self, name) for name in SHAPES})
        last = None if self._outputs() is None else len(self.known) - 1
        if self.labels is not None:
            _check_labels(np.asarray(self.labels), last)

    def _outputs(self) -> int | None:
        for name in ("logits", "weight", "bias"):
            value = getattr(self, name)
            if value is not None:
                return int(value.shape[SHAPES[name].index("L")])
        return None

    @property
    def outputs(self) -> int:
        """L, as the logits or the last layer tell it.

        Raises:
            UsageError: neither is given.
        """
        outputs = self._outputs()
        if outputs is None:
            raise UsageError(
                "the number of logits is needed, and neither logits nor weight is given"
            )
        return outputs

    @property
    def known(self) -> Ints:
        """Logits of the known classes, in order: int64 [K]."""
        return known_columns(self.outputs, self.unknown_index)

    def need(self, name: str, score: str) -> NDArray[Any]:
        """The array called ``name``.

        Raises:
            UsageError: it is not given; names the score that needs it.
        """
        value = getattr(self, name)
        if value is None:
            raise UsageError(
                f"the score {score} is fitted to {name}, and none are given"
                if name.endswith("s") and name != "bias"
                else f"the score {score} needs the {name} of the last linear layer",
                remedy=f"Give {name} of shape [{', '.join(SHAPES[name])}]",
            )
        return np.asarray(value)

    def known_logits(self, score: str) -> Iterator[tuple[slice, Floats]]:
        """The known classes' logits in blocks of rows: (rows, float64 [B, K])."""
        logits, known = self.need("logits", score), self.known
        return ((here, logits[here][:, known].astype(np.float64)) for here in rows(len(logits)))

    def known_head(self, score: str) -> tuple[Floats, Floats]:
        """Rows of the last layer for the known classes: weight [K, D], bias [K], float64."""
        weight = self.need("weight", score)[self.known].astype(np.float64)
        bias = np.zeros(len(weight))
        if self.bias is not None:
            bias = np.asarray(self.bias)[self.known].astype(np.float64)
        return weight, bias


def rows(count: int, size: int = ROWS) -> Iterator[slice]:
    """Slices of at most ``size`` rows that cover ``count`` rows."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def blocks(values: NDArray[Any], size: int = ROWS) -> Iterator[Floats]:
    """``values`` in float64, ``size`` rows at a time: no copy of the whole is made."""
    return (values[here].astype(np.float64) for here in rows(len(values), size))


def known_columns(outputs: int, unknown_index: int | None) -> Ints:
    """Logits of the known classes, in order: int64 [K].

    Raises:
        UsageError: ``unknown_index`` is outside the logits, or no known class remains.
    """
    columns = np.arange(outputs)
    if unknown_index is None:
        return columns
    if not -outputs <= unknown_index < outputs:
        raise UsageError(f"unknown_index {unknown_index} is outside the {outputs} logits")
    if outputs < 2:
        raise UsageError("the unknown class is the only logit: no known class remains")
    return np.delete(columns, unknown_index % outputs)


def _checked(name: str, letters: str, value: ArrayLike) -> NDArray[Any]:
    array: NDArray[Any] = np.asarray(value)
    if array.ndim != len(letters) or 0 in array.shape:
        raise UsageError(f"{name} must have shape [{', '.join(letters)}], not {list(array.shape)}")
    whole = np.issubdtype(array.dtype, np.integer)
    if not whole and (name == "labels" or not np.issubdtype(array.dtype, np.floating)):
        wanted = "whole numbers" if name == "labels" else "numbers"
        raise UsageError(f"{name} must be {wanted}, not {array.dtype}")
    if not all(np.isfinite(part).all() for part in blocks(array)):
        raise UsageError(
            f"{name} holds NaN or infinite values, from which no constants can be computed",
            remedy="Check the model, or leave those images out",
        )
    return array


def _check_sizes(arrays: dict[str, NDArray[Any] | None]) -> None:
    seen: dict[str, tuple[str, int]] = {}
    for name, array in arrays.items():
        if array is None:
            continue
        for letter, size in zip(SHAPES[name], array.shape, strict=True):
            other, expected = seen.setdefault(letter, (name, size))
            if size != expected:
                raise UsageError(
                    f"{other} and {name} do not fit together: {letter} is {expected} in the one "
                    f"and {size} in the other"
                )


def _check_labels(labels_N: Ints, last: int | None) -> None:
    wrong = labels_N < 0
    if last is not None:
        wrong |= labels_N > last
    if wrong.any():
        end = "" if last is None else f", which are 0 to {last}"
        raise UsageError(
            f"label {int(labels_N[wrong][0])} is not one of the known classes{end}",
            remedy="Leave out images of other classes",
        )
