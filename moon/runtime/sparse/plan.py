"""How a convolution is done: tile, rows together, how columns are read, blocks of columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moon.runtime.sparse.frame import Frame
from moon.runtime.sparse.geometry import Geometry
from moon.runtime.sparse.ir import LANES
from moon.runtime.sparse.kernels_conv import IN_PLACE, Reading
from moon.runtime.sparse.layout import Planes

__all__ = [
    "EXACT_FROM", "FAR", "TILES", "Plan", "copied_vectors", "cut", "halo", "readings", "sound",
    "whole_rows", "written",
]  # fmt: skip

# Registers for sums: tiles by rows together, for 32 registers of sixteen floats.
TILES = {1: (1, 2, 3, 4, 5, 6, 7, 8, 10, 13), 4: (1, 2, 3, 4, 5, 6)}
# Columns lie at offsets below this, in vectors.
FAR = 1 << 16
_MOST_TILE = 16
_MOST_SUMS = 24
# From tiles of so many vectors on, lists of nonzeros are not padded.
EXACT_FROM = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to do a convolution.

    Attributes:
        tile: vectors held in registers.
        together: output rows that share columns, 1 or 4.
        reading: how columns are read.
        block: columns (of the weight matrix, those without nonzeros left out) in a block.
    """

    tile: int
    together: int
    reading: Reading
    block: int

    def to_json(self) -> dict[str, int | str]:
        """As the arguments of a plan."""
        return {
            "tile": self.tile,
            "together": self.together,
            "reading": self.reading,
            "block": self.block,
        }


def readings(geometry: Geometry) -> tuple[Reading, ...]:
    """Ways to read the columns of a convolution."""
    found: list[Reading] = []
    if geometry.flat and geometry.window.taps == 1 and not geometry.shifts.any():
        planes = geometry.phased
        if planes.channels * planes.pitch <= FAR:
            found.append("direct")
        found.append("shift")
        return tuple(found)
    if _can_frame(geometry):
        found.append("frame")
    if not geometry.flat:
        return (*found, "gather")
    if int(np.ptp(geometry.taps.row)) and geometry.target.width % LANES == 0:
        found.append("rows")
    return (*found, "shift")


def _can_frame(geometry: Geometry) -> bool:
    """Whether all phases of a channel are within reach, and margins not most of the frame."""
    planes = Frame.around(geometry).planes
    near = planes.pitch * LANES * len(geometry.taps.phases) <= FAR
    return near and planes.nbytes <= 8 * geometry.source.nbytes + (1 << 16)


def written(geometry: Geometry, reading: Reading) -> Planes:
    """The shape of what a convolution writes."""
    if reading == "frame":
        return Frame.around(geometry).written(geometry.target)
    return geometry.target


def halo(geometry: Geometry) -> int:
    """Vectors above and below a tile that its taps read, when copied by rows."""
    rows = geometry.taps.row
    return int(rows.max() - rows.min()) * geometry.target.width // LANES


def copied_vectors(geometry: Geometry, plan: Plan) -> int:
    """Vectors of a column as it is copied."""
    return plan.tile + (halo(geometry) if plan.reading == "rows" else 0)


def cut(planes: Planes, plan: Plan) -> list[tuple[int, int, int, int]]:
    """The tiles of planes: vectors, lanes of the last one, where they begin, how many there are.

    Of a last vector with few pixels only a part is computed, and where nothing is copied it joins
    the tile before it.
    """
    vectors, tile = planes.vectors, plan.tile
    pixels = planes.pixels - LANES * (vectors - 1)
    tail = next(lanes for lanes in (4, 8, LANES) if pixels <= lanes)
    last = vectors % tile or tile
    if tail == LANES:
        last = vectors % tile
    elif last == 1 and plan.reading in IN_PLACE and 1 < tile < vectors:
        # Unless its sums would not fit the registers.
        last = tile + 1 if (tile + 1) * plan.together <= _MOST_SUMS else 1
    found = [(tile, LANES, 0, (vectors - last) // tile), (last, tail, vectors - last, 1)]
    return [part for part in found if part[0] and part[3]]


def sound(geometry: Geometry, plan: Plan) -> bool:
    """Whether a plan, wherever it comes from, can be carried out for this geometry."""
    known = plan.together in TILES and plan.reading in readings(geometry) and plan.block >= 1
    fits = known and 1 <= plan.tile <= min(_MOST_TILE, written(geometry, plan.reading).vectors)
    return fits and (plan.reading != "rows" or whole_rows(geometry, plan.tile))


def whole_rows(geometry: Geometry, tile: int) -> bool:
    """Whether tiles that copy rows fill the planes, and none has two images."""
    target = geometry.target
    image = target.height * target.width // LANES
    whole = target.vectors % tile == 0 and (target.images == 1 or image % tile == 0)
    return whole and tile + halo(geometry) < FAR
