"""How the nonzeros of a weight are stored: uint8 index gaps, or a bitmask.

Both list the nonzero values in row-major order; they differ in how they say where these are.

Gaps. ``gaps[i]`` is the distance of value i from the one before it, the first from index 0, so
a running sum of the gaps gives the flat indices. A distance over 255 is reached in steps: a gap
of 255 with the value zero, as often as needed (its index is inside the distance, where the weight
is zero). Cost: 1 + v bytes a stored value, v the bytes of a value.

Bitmask. Bit ``i % 8`` of byte ``i // 8`` (least significant first) is set where element i is not
zero; spare bits of the last byte are zero. Cost: n / 8 bytes and v bytes a nonzero.

Gaps are smaller below a density of about 1/8, the bitmask above. Which is the smaller in a file
depends on the operators that decode it as well: see pack.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "Encoded", "Kind", "decode", "encode"]

Kind = Literal["gaps", "bitmask"]
KINDS: tuple[Kind, ...] = ("gaps", "bitmask")
_STEP = 255


@dataclass(frozen=True)
class Encoded:
    """The nonzeros of one weight.

    Attributes:
        kind: "gaps" or "bitmask".
        where: uint8, the gaps or the mask's bytes.
        values: the nonzeros (with the zeros that stand for long gaps), one-dimensional.
        shape: of the weight.
    """

    kind: Kind
    where: NDArray[np.uint8]
    values: NDArray[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.where.nbytes + self.values.nbytes


def _gaps(flat: NDArray[Any], positions: NDArray[np.int64]) -> tuple[NDArray[np.uint8], Any]:
    if not len(positions):
        # One stored zero: runtimes are not sure to accept tensors without elements.
        return np.zeros(1, dtype=np.uint8), np.zeros(1, dtype=flat.dtype)
    distances = np.diff(positions, prepend=0)
    # A distance of 255 is one byte; 256 needs one step before it.
    steps = np.maximum(distances - 1, 0) // _STEP
    places = np.cumsum(steps + 1) - 1
    total = int(places[-1]) + 1
    gaps = np.full(total, _STEP, dtype=np.uint8)
    gaps[places] = (distances - steps * _STEP).astype(np.uint8)
    values = np.zeros(total, dtype=flat.dtype)
    values[places] = flat[positions]
    return gaps, values


def encode(weight: NDArray[Any], kind: Kind) -> Encoded:
    """Store ``weight`` (any shape, floating) in one of the forms."""
    flat = np.ascontiguousarray(weight).reshape(-1)
    positions = np.flatnonzero(flat)
    if kind == "gaps":
        return Encoded(kind, *_gaps(flat, positions), weight.shape)
    mask = np.packbits(flat != 0, bitorder="little")
    return Encoded(kind, mask, flat[positions], weight.shape)


def decode(encoded: Encoded) -> NDArray[Any]:
    """The weight again: what the graph's own operators compute, in numpy."""
    size = int(np.prod(encoded.shape, dtype=np.int64))
    flat = np.zeros(size, dtype=encoded.values.dtype)
    if encoded.kind == "gaps":
        positions = np.cumsum(encoded.where, dtype=np.int64)
    else:
        positions = np.flatnonzero(np.unpackbits(encoded.where, bitorder="little"))
    flat[positions] = encoded.values
    return flat.reshape(encoded.shape)
