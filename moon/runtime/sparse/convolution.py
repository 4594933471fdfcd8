"""A convolution made ready to run: its weights encoded, its records filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.columns import Columns, place
from moon.runtime.sparse.conv_weights import ConvWeights
from moon.runtime.sparse.encode import Stream, encode, units_of
from moon.runtime.sparse.frames import Record, address
from moon.runtime.sparse.geometry import Geometry
from moon.runtime.sparse.ir import VECTOR_BYTES
from moon.runtime.sparse.kernels_conv import BLOCK, CONV, PART, ConvKernel
from moon.runtime.sparse.memory import Reach, Space
from moon.runtime.sparse.plan import EXACT_FROM, Plan, copied_vectors, cut, sound, written
from moon.runtime.sparse.taps import tap_tables

__all__ = ["CALLS", "Call", "Convolution", "Places"]

CALLS = 2


@dataclass(frozen=True, kw_only=True)
class Call:
    """A kernel and the record it reads."""

    kernel: ConvKernel
    record: Record


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a convolution reads and writes.

    Attributes:
        source: planes, in the frame that the reading asks for.
        target: planes that are written, of the shape ``Convolution.written``.
        residual: planes that are added, or None; of the same shape.
        scratch: memory of ``scratch_step`` bytes for every share of every call, `CALLS` at most:
            threads may be at work on two calls at a time.
    """

    source: NDArray[np.float32]
    target: NDArray[np.float32]
    residual: NDArray[np.float32] | None
    scratch: NDArray[np.uint8]
    scratch_step: int


class Convolution:
    """A convolution for planes of one size.

    Args:
        weights: of all rows.
        bias: float32 [rows].
        geometry: of the taps.
        plan: how it is done.
        parts: rows are dealt to so many parts, for threads.
        permute: see :class:`moon.runtime.sparse.kernels_conv.ConvKernel`.
        space: gives the memory of streams and tables.

    Attributes:
        written: the shape of what is written: the target's, or as it lies over a frame.
        scratch_bytes: of a thread's own memory.
        reach: how far it reads beyond its source.

    Raises:
        ValueError: the plan cannot be carried out, or the activations are larger than 4 GiB.
    """

    def __init__(
        self,
        weights: ConvWeights,
        bias: NDArray[np.float32],
        geometry: Geometry,
        plan: Plan,
        *,
        parts: int = 1,
        permute: bool = False,
        space: Space,
    ) -> None:
        if not sound(geometry, plan) or bias.shape != (weights.rows,) or parts < 1:
            raise ValueError(f"{plan} is not for {geometry}")
        self._geometry, self.plan, self._parts, self._space = geometry, plan, parts, space
        self._permute = permute
        self.written = written(geometry, plan.reading)
        self._bias = space.table(bias.astype(np.float32))
        columns = place(weights, geometry, plan)
        entries = units_of(weights.row, columns.which, weights.value, weights.rows, plan.together)
        streams = encode(
            entries, columns.bounds, columns.offsets, parts, exact=plan.tile >= EXACT_FROM
        )
        self._step = copied_vectors(geometry, plan) * VECTOR_BYTES
        self.scratch_bytes = columns.most * self._step
        shifted = plan.reading in ("shift", "rows")
        self.reach = Reach(*geometry.reach) if shifted else Reach()
        self.nbytes = sum(s.rows.nbytes + s.data.nbytes for block in streams for s in block)
        self._kept: list[Any] = []
        self._blocks = self._table(streams, columns)
        self._fields = {
            name: space.table(value) if isinstance(value, np.ndarray) else value
            for name, value in tap_tables(geometry, plan).items()
        }

    def _table(self, streams: list[list[Stream]], columns: Columns) -> NDArray[np.int64]:
        """The table of blocks; what it points to is kept."""
        rows = []
        for number, block in enumerate(streams):
            parts = self._space.table(PART.table([self._part(stream) for stream in block]))
            copied = columns.tables[number] if columns.tables else np.zeros(0, np.uint32)
            copied = self._space.table(copied)
            self._kept += [parts, copied]
            rows.append(
                {
                    "base": columns.bases[number] if columns.bases else 0,
                    "columns": address(copied),
                    "column_count": len(copied) // 2,
                    "parts": address(parts),
                }
            )
        return self._space.table(BLOCK.table(rows))

    def _part(self, stream: Stream) -> dict[str, int]:
        rows, data = self._space.table(stream.rows), self._space.table(stream.data)
        self._kept += [rows, data]
        return {"rows": address(rows), "row_count": stream.count, "stream": address(data)}

    def calls(self, places: Places, low: float, high: float) -> list[Call]:
        """The kernels to run, and their records.

        Args:
            places: where they read and write.
            low, high: outputs are clamped to these.
        """
        calls, plan = [], self.plan
        scratches = places.scratch.reshape(CALLS, -1)
        for scratch, (size, tail, first, count) in zip(
            scratches, cut(self.written, plan), strict=False
        ):
            record = self._record(places, scratch, first, count, low, high)
            kernel = ConvKernel(size, plan.together, plan.reading, tail, self._permute)
            calls.append(Call(kernel=kernel, record=record))
        return calls

    def _record(
        self,
        places: Places,
        scratch: NDArray[np.uint8],
        first: int,
        tiles: int,
        low: float,
        high: float,
    ) -> Record:
        if places.scratch_step < self.scratch_bytes:
            raise ValueError("the scratch memory is too small")
        return CONV.record(
            source=places.source,
            target=places.target,
            residual=places.residual,
            bias=self._bias,
            pitch=self.written.pitch * VECTOR_BYTES,
            first=first,
            tiles=tiles,
            parts=self._parts,
            blocks=self._blocks,
            block_count=len(self._blocks),
            copied=self._step // VECTOR_BYTES,
            step=self._step,
            low=float(low),
            high=float(high),
            scratch=scratch,
            scratch_step=places.scratch_step,
            **self._fields,
        )
