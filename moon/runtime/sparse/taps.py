"""What kernels need to know of taps to copy columns: shifts, masks, indices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.geometry import Geometry, packed
from moon.runtime.sparse.ir import LANES
from moon.runtime.sparse.kernels_conv import IN_PLACE
from moon.runtime.sparse.plan import Plan, copied_vectors

__all__ = ["tap_tables"]

Ints = NDArray[np.int64]


def tap_tables(geometry: Geometry, plan: Plan) -> dict[str, Any]:
    """Fields of a convolution's record: by tap, or by kind of tap where rows are copied."""
    none = {"shifts": None, "masks": None, "index": None, "mask_step": 0}
    step = geometry.target.vectors
    if plan.reading in IN_PLACE:
        return none
    if plan.reading == "gather":
        return {**none, "index": geometry.indices, "mask_step": step}
    if plan.reading == "shift":
        return {**none, "shifts": geometry.shifts, "masks": geometry.masks, "mask_step": step}
    return {**none, **_row_tables(geometry, plan)}


def _row_tables(geometry: Geometry, plan: Plan) -> dict[str, Any]:
    """Masks by kind, tile and copied vector: the pixel must lie in the image of the tile."""
    target, copied = geometry.target, copied_vectors(geometry, plan)
    top = int(geometry.taps.row.min())
    tiles = target.vectors // plan.tile
    flat = (
        np.arange(tiles)[:, None] * plan.tile * LANES
        + np.arange(copied * LANES)[None, :]
        + top * target.width
    )
    area = target.height * target.width
    image = np.arange(tiles)[:, None] * plan.tile * LANES // area
    row = (flat - image * area) // target.width
    whole = (row >= 0) & (row < geometry.phase_size[0])
    masks, shifts = [], []
    for tap in geometry.taps.kinds[1]:
        dx = int(geometry.taps.column[tap])
        column = flat % target.width + dx
        inside = whole & (column >= 0) & (column < geometry.phase_size[1])
        inside &= _real(geometry, geometry.taps.phases[geometry.taps.phase[tap]], row, column)
        masks.append(packed(inside))
        shifts.append((top * target.width + dx) * 4)
    return {
        "shifts": np.array(shifts, np.int64),
        "masks": np.stack(masks),
        "mask_step": tiles * copied,
    }


def _real(geometry: Geometry, phase: int, row: Ints, column: Ints) -> NDArray[np.bool_]:
    """Whether phase pixels are pixels: a phase's last row or column may be beyond the edge."""
    strides = geometry.window.strides
    y = row * strides[0] + phase // strides[1]
    x = column * strides[1] + phase % strides[1]
    found: NDArray[np.bool_] = (y < geometry.source.height) & (x < geometry.source.width)
    return found
