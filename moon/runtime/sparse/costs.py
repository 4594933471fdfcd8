"""Which plan a convolution gets: the cheapest by a model of the cost in cycles of one core.

The model is coarse but in proportion; a tuner may choose otherwise. It never depends on the number
of threads, so that results do not either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.frame import Frame
from moon.runtime.sparse.geometry import Geometry
from moon.runtime.sparse.ir import LANES, VECTOR_BYTES
from moon.runtime.sparse.kernels_conv import IN_PLACE, Reading
from moon.runtime.sparse.plan import (
    EXACT_FROM,
    FAR,
    TILES,
    Plan,
    cut,
    halo,
    readings,
    whole_rows,
    written,
)

__all__ = ["SAVED", "Costs", "Weights", "candidates", "choose"]

_BLOCK_BYTES = (16_384, 24_576, 32_768, 65_536, 262_144, 524_288, 1 << 30)
# Of a vector's cost, by the lanes that are computed.
SAVED = {4: 0.5, 8: 0.3, LANES: 0.0}
# Planes of fewer vectors are fetched as a whole by what is read of them.
_NEXT = 32


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a plan needs to know of a weight.

    Attributes:
        rows: output channels.
        columns: pairs of input channel and tap with a nonzero.
        pairs: the same, taps in a column of the kernel counted once.
        nonzeros: weights.
        shared: columns of every four rows, added up.
    """

    rows: int
    columns: int
    pairs: int
    nonzeros: int
    shared: int

    @classmethod
    def of(
        cls, rows: int, row: NDArray[np.int64], column: NDArray[np.int64], pair: NDArray[np.int64]
    ) -> Weights:
        """From the positions of nonzeros; ``pair`` of each column as ``pairs`` counts them."""
        width = int(column.max(initial=0)) + 1
        used = np.unique(column)
        return cls(
            rows=rows,
            columns=len(used),
            pairs=len(np.unique(pair[used])),
            nonzeros=len(row),
            shared=len(np.unique(row // 4 * width + column)),
        )


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Cycles of what kernels do, for vectors of sixteen floats.

    Attributes:
        near, far: a vector from the first-level and the second-level cache.
        multiply: a multiply-add of registers.
        weight: a nonzero's weight and offset.
        row: a unit's beginning and end, beside its outputs.
        shifted: more for a vector that lies on no bound.
        copy, gather: a vector into the tile's own memory.
        arrange: a vector into a frame, or out of one.
        first_level, second_level: bytes that stay in these caches.
        registers: vectors of sixteen floats that may hold sums.
        permute: see :class:`moon.runtime.sparse.kernels_conv.ConvKernel`.
    """

    near: float = 0.72
    far: float = 1.15
    multiply: float = 0.5
    weight: float = 0.85
    row: float = 9.0
    shifted: float = 0.7
    copy: float = 2.2
    arrange: float = 4.0
    gather: float = 12.0
    first_level: int = 40_000
    second_level: int = 700_000
    registers: int = 26
    permute: bool = False

    @classmethod
    def of(cls, isa: str, cpu: str = "") -> Costs:
        """For an instruction set, and a CPU as LLVM calls it."""
        if isa == "avx512":
            return _ZEN4 if cpu == "znver4" else cls()
        if isa == "avx2":
            return cls(near=1.0, far=1.4, multiply=1.0, registers=6)
        return cls(near=2.0, far=2.5, multiply=2.0, registers=3 if isa == "sse" else 7)


# A vector of sixteen floats is two of its registers: one load and one multiply-add a cycle.
_ZEN4 = Costs(
    near=1.03, far=2.5, multiply=1.0, weight=0.6, row=18.0, shifted=0.75, copy=3.0,
    first_level=30_000, second_level=300_000, registers=22, permute=True,
)  # fmt: skip


def tiles(geometry: Geometry, costs: Costs, together: int, reading: Reading) -> Iterator[int]:
    """Tile sizes that fit the registers and the planes."""
    vectors = written(geometry, reading).vectors
    for tile in TILES[together]:
        if tile > vectors or (tile > 1 and tile * together > costs.registers):
            continue
        if reading != "rows" or whole_rows(geometry, tile):
            yield tile


def candidates(geometry: Geometry, weights: Weights, costs: Costs) -> list[tuple[float, Plan]]:
    """All plans worth a thought with their cost in cycles, the cheapest first."""
    found: dict[Plan, float] = {}
    for reading in readings(geometry):
        for together in TILES:
            for tile in tiles(geometry, costs, together, reading):
                for bytes_ in _BLOCK_BYTES:
                    plan = _plan(geometry, weights, tile, together, reading, bytes_)
                    if plan is not None:
                        found[plan] = _cost(geometry, weights, costs, plan)
    return sorted(((cost, plan) for plan, cost in found.items()), key=lambda item: item[0])


def choose(geometry: Geometry, weights: Weights, costs: Costs) -> Plan:
    """The cheapest plan."""
    return candidates(geometry, weights, costs)[0][1]


def _plan(
    geometry: Geometry, weights: Weights, tile: int, together: int, reading: Reading, bytes_: int
) -> Plan | None:
    column = _column_vectors(geometry, weights, tile, reading)
    fits = bytes_ / (column * VECTOR_BYTES)
    block = max(1, min(weights.columns, int(fits)))
    if reading not in IN_PLACE and block * column * 1.1 + 64 >= FAR:
        return None
    return Plan(tile=tile, together=together, reading=reading, block=block)


def _column_vectors(geometry: Geometry, weights: Weights, tile: int, reading: Reading) -> float:
    """Vectors of a column that are read, or copied into the tile's memory."""
    if reading == "frame":  # those of a channel's taps overlap
        frame = Frame.around(geometry)
        shifts = frame.shifts(geometry)
        each = len(frame.phases) * tile + int(np.ptp(shifts)) / LANES
        used = weights.columns / geometry.window.taps
        return min(tile, each * max(1.0, used) / max(1, weights.columns))
    if reading != "rows":
        return tile
    return (tile + halo(geometry)) * max(1, weights.pairs) / max(1, weights.columns)


def _cost(geometry: Geometry, weights: Weights, costs: Costs, plan: Plan) -> float:
    """Cycles for all tiles."""
    column = _column_vectors(geometry, weights, plan.tile, plan.reading)
    blocks = -(-weights.columns // plan.block) if weights.columns else 1
    alone = plan.together == 1
    units = weights.rows if alone else -(-weights.rows // 4)
    padded = 0.0 if alone and plan.tile >= EXACT_FROM else 1.5 * units * blocks
    steps = (weights.nonzeros if alone else weights.shared) + padded
    shifted = costs.shifted if plan.reading == "frame" else 0.0
    load = _load(costs, _room(geometry, plan, column), shifted)
    multiply = costs.multiply * plan.together
    # Loads and multiply-adds go on side by side; a little of the lesser shows.
    lesser = min(load, multiply) * 0.15
    each = max(load, multiply) + lesser
    outputs = (2 if blocks > 1 else 1) * plan.together * costs.far
    copies = {"direct": 0.0, "frame": 0.0, "gather": costs.gather}.get(plan.reading, costs.copy)
    made = written(geometry, plan.reading)
    parts = cut(made, plan)
    tiles = sum(count for _, _, _, count in parts)
    # Of the last vector only a part may be computed.
    vectors = made.vectors - SAVED[parts[-1][1]]
    by_tile = steps * costs.weight * (1 if alone else 2) + units * blocks * costs.row
    by_vector = steps * each + units * blocks * outputs
    copied = made.vectors / plan.tile * weights.columns * column * copies
    around = _around(geometry, weights, costs, plan)
    return tiles * by_tile + vectors * by_vector + copied + around


def _around(geometry: Geometry, weights: Weights, costs: Costs, plan: Plan) -> float:
    """Cycles of what goes before and after a convolution in a frame."""
    if plan.reading != "frame":
        return 0.0
    frame = Frame.around(geometry)
    vectors = frame.planes.channels * frame.planes.vectors
    target = geometry.target
    if frame.written(target) != target:
        vectors += weights.rows * target.images * target.height * -(-target.width // LANES)
    return vectors * costs.arrange


def _room(geometry: Geometry, plan: Plan, column: float) -> float:
    """Vectors that a block's columns take in a first-level cache."""
    # Of planes that lie far apart the CPU fetches what follows a tile, in vain.
    apart = plan.reading == "direct" and geometry.phased.pitch > _NEXT
    return plan.block * (column + 1 if apart else column)


def _load(costs: Costs, vectors: float, shifted: float) -> float:
    """Cycles to load a vector out of so many."""
    bytes_, near, far = vectors * VECTOR_BYTES, costs.near + shifted, costs.far + shifted
    if bytes_ > costs.second_level:
        return 1.5 * far
    missed = 1 - costs.first_level / bytes_ if bytes_ > costs.first_level else 0.0
    return near + (far - near) * missed
