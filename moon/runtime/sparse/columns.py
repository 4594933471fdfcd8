"""Which columns of a weight a tile copies, block by block, and where they then lie.

A column is an input channel at a tap; those without a nonzero are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.conv_weights import ConvWeights
from moon.runtime.sparse.frame import Frame
from moon.runtime.sparse.geometry import Geometry
from moon.runtime.sparse.ir import LANES, VECTOR_BYTES
from moon.runtime.sparse.plan import FAR, Plan, copied_vectors

__all__ = ["Columns", "place"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Used columns in the order of blocks.

    Attributes:
        which: for each nonzero the place of its column among the used ones, int64 [n].
        bounds: where blocks of used columns begin, and their number.
        offsets: of each used column within its block, in vectors.
        bases: of each block, bytes from the source's first plane; where columns are read where
            they lie.
        tables: by block what is copied: a plane's byte offset and a tap (or kind of tap), and so
            on, uint32; empty where columns are read where they lie.
        most: the most that a block copies.
    """

    which: Ints
    bounds: tuple[int, ...]
    offsets: Ints
    bases: tuple[int, ...] = ()
    tables: tuple[NDArray[np.uint32], ...] = ()
    most: int = 0


def place(weights: ConvWeights, geometry: Geometry, plan: Plan) -> Columns:
    """The columns as a plan has them.

    Raises:
        ValueError: the activations are larger than 4 GiB.
    """
    used, which = np.unique(weights.column, return_inverse=True)
    pairs = weights.pairs(geometry)[used]
    if plan.reading == "rows":  # what is copied together lies together
        order = np.argsort(pairs, kind="stable")
        used, pairs, which = used[order], pairs[order], np.argsort(order)[which]
    plane, tap = _planes(used, weights.taps, geometry, plan)
    if plan.reading == "frame":
        return _framed(which, plane, tap, geometry, plan)
    pitch = (geometry.source if plan.reading == "gather" else geometry.phased).pitch
    if plan.reading == "rows":
        bounds = _bounds_of_pairs(pairs, plan, copied_vectors(geometry, plan))
        return _rows(which, bounds, plane * pitch * VECTOR_BYTES, tap, pairs, geometry, plan)
    if plan.reading == "direct":
        bounds = _bounds(len(used), plan.block)
        return Columns(
            which=which, bounds=bounds, offsets=plane * pitch, bases=(0,) * (len(bounds) - 1)
        )
    bounds = _bounds(len(used), min(plan.block, (FAR - 1) // plan.tile))
    offsets, tables = np.zeros(len(used), np.int64), []
    for begin, end in pairwise(bounds):
        offsets[begin:end] = np.arange(end - begin) * plan.tile
        tables.append(_table(plane[begin:end] * pitch * VECTOR_BYTES, tap[begin:end]))
    most = max(np.diff(bounds))
    return Columns(
        which=which, bounds=bounds, offsets=offsets, tables=tuple(tables), most=int(most)
    )


def _framed(which: Ints, plane: Ints, tap: Ints, geometry: Geometry, plan: Plan) -> Columns:
    """Blocks of columns whose offsets from the first one's channel fit their field."""
    frame = Frame.around(geometry)
    shifts = frame.shifts(geometry)[tap]
    pitch, phases = frame.planes.pitch * LANES, len(frame.phases)
    first = plane // phases * phases
    bounds, bases = [0], [int(first[0]) * pitch] if len(first) else [0]
    at = plane * pitch + shifts
    for i in range(len(at)):
        if i - bounds[-1] == plan.block or at[i] - bases[-1] >= FAR:
            bounds.append(i)
            bases.append(int(first[i]) * pitch)
    bounds = [*bounds, len(at)]
    offsets = at - np.repeat(bases, np.diff(bounds))
    return Columns(
        which=which, bounds=tuple(bounds), offsets=offsets, bases=tuple(4 * base for base in bases)
    )


def _planes(used: Ints, taps: int, geometry: Geometry, plan: Plan) -> tuple[Ints, Ints]:
    """The plane each column reads, and its tap."""
    channel, tap = used // taps, used % taps
    if plan.reading != "gather":
        return channel * len(geometry.taps.phases) + geometry.taps.phase[tap], tap
    return channel, tap


def _bounds(count: int, block: int) -> tuple[int, ...]:
    return (*range(0, count, block), count) if count else (0, 0)


def _bounds_of_pairs(pairs: Ints, plan: Plan, copied: int) -> tuple[int, ...]:
    """Blocks in which pairs copied together stay together, and no offset is too large."""
    if not len(pairs):
        return 0, 0
    starts = np.flatnonzero(np.diff(pairs, prepend=-1))
    bounds, inside = [0], 0
    for start, end in zip(starts, [*starts[1:], len(pairs)], strict=True):
        far = (inside + 1) * copied >= FAR
        if start > bounds[-1] and (far or end - bounds[-1] > plan.block):
            bounds.append(int(start))
            inside = 0
        inside += 1
    return (*bounds, len(pairs))


def _rows(
    which: Ints,
    bounds: Sequence[int],
    bytes_: Ints,
    tap: Ints,
    pairs: Ints,
    geometry: Geometry,
    plan: Plan,
) -> Columns:
    kind = geometry.taps.kinds[0][tap]
    down = (geometry.taps.row - geometry.taps.row.min())[tap]
    down = down * geometry.target.width // LANES
    offsets, tables, most = np.zeros(len(tap), np.int64), [], 0
    for begin, end in pairwise(bounds):
        mine = np.arange(begin, end)
        _, first, number = np.unique(pairs[mine], return_index=True, return_inverse=True)
        offsets[mine] = number * copied_vectors(geometry, plan) + down[mine]
        tables.append(_table(bytes_[mine[first]], kind[mine[first]]))
        most = max(most, len(first))
    return Columns(
        which=which, bounds=tuple(bounds), offsets=offsets, tables=tuple(tables), most=most
    )


def _table(bytes_: Ints, tap: Ints) -> NDArray[np.uint32]:
    """Pairs of a plane's offset and a tap, one after the other."""
    if int(bytes_.max(initial=0)) >= 1 << 32:
        raise ValueError("the activations are larger than 4 GiB")
    return np.ascontiguousarray(np.stack([bytes_, tap], axis=1).astype(np.uint32)).reshape(-1)
