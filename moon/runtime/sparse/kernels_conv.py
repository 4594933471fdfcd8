"""The convolution kernel: sparse rows over tiles of pixels.

    for each tile of T vectors of pixels and part of the rows:
        for each block of columns (a column is an input channel at a tap):
            copy the block's columns of the tile together, unless they are read where they lie
            for each output row, or four of them: add weight times column over its nonzeros

The first block starts from the bias and the others from what is in the output; the last one
adds the residual and clamps. A tile of a block stays in the first-level cache, or at least in
the second, while all rows pass over it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llvmlite import ir

from moon.runtime.sparse.frames import Layout
from moon.runtime.sparse.ir import F32, I16, I32, I64, INTS, LANES, PTR, VEC, VECTOR_BYTES, Fn

__all__ = [
    "BLOCK", "COLUMN_BYTES", "CONV", "GROUP", "IN_PLACE", "PART", "ROW_BYTES", "ConvKernel",
    "Reading", "build_conv",
]  # fmt: skip

# How columns are read: where they lie; where they lie in a frame, on any bound of floats; copied
# with a shift; copied as rows of the image with what is above and below; gathered by an index.
Reading = Literal["direct", "frame", "shift", "rows", "gather"]

IN_PLACE = ("direct", "frame")  # nothing is copied

CONV = Layout(
    "source", "target", "residual", "bias", "pitch",  # pitch: bytes of an output plane
    "first", "tiles", "parts",  # the first vector; tiles from there; parts of the rows
    "blocks", "block_count",
    "shifts", "masks", "mask_step", "index",  # by tap; steps in vectors
    "copied", "step",  # vectors of a copied column, and bytes from one to the next
    "low", "high", "scratch", "scratch_step",
)  # fmt: skip
# base: bytes from the source to what offsets count from, where columns are read where they lie.
BLOCK = Layout("base", "columns", "column_count", "parts")
PART = Layout("rows", "row_count", "stream")
# A column to copy: u32 byte offset of its plane, u32 tap.
COLUMN_BYTES = 8
# A row: u32 number of the (first) output plane, u16 and u16: for one row its groups of sixteen
# nonzeros, and four times its groups of four with the number of single ones; for four rows its
# groups of four, and how many of the rows there are.
ROW_BYTES = 8
# Nonzeros in a group of a stream, and rows of it -> bytes: float32 weights, then u16 offsets
# counted in vectors, or in floats in a frame. A single one has two bytes that mean nothing.
GROUP = {(16, 1): 96, (4, 1): 24, (1, 1): 8, (4, 4): 72}
# So far ahead the stream is fetched, in bytes: it is read once, from a cache farther away.
_AHEAD = 2048
# So many rows ahead, lines of the output and the residual.
_ROWS_AHEAD = 2


@dataclass(frozen=True)
class ConvKernel:
    """A kernel's shape.

    Attributes:
        tile: T, vectors of pixels held in registers, 1 to 16.
        rows: output rows that share a list of columns: 1 or 4.
        reading: how columns are read.
        tail: lanes of the last vector that hold pixels, as much of a register as is computed of it:
            4, 8 or 16.
        permute: weights are spread over a vector by a permutation where that can be, for CPUs that
            load too slowly to do it by loads beside those of columns.
    """

    tile: int
    rows: int
    reading: Reading
    tail: int = LANES
    permute: bool = False

    @property
    def name(self) -> str:
        """Of its function."""
        tail = f"_l{self.tail}" if self.tail < LANES else ""
        way = "_p" if self.permute else ""
        return f"conv_{self.reading}_r{self.rows}_t{self.tile}{tail}{way}"

    @property
    def kinds(self) -> list[ir.VectorType]:
        """Types of the tile's vectors."""
        return [VEC] * (self.tile - 1) + [ir.VectorType(F32, self.tail)]

    @property
    def sums(self) -> int:
        """Partial sums of an output vector, so that one addition need not wait for the other."""
        return max(1, 4 // (self.tile * self.rows))


def build_conv(module: ir.Module, kernel: ConvKernel) -> None:
    """Write ``kernel.name``(record, thread, threads) into ``module``."""
    _Writer(module, kernel).write()


class _Writer:
    def __init__(self, module: ir.Module, kernel: ConvKernel) -> None:
        self.kernel = kernel
        arguments = [(PTR, "record"), (I64, "thread"), (I64, "threads")]
        self.k = Fn(module, kernel.name, arguments)
        self.indices: dict[int, Any] = {}

    def field(self, name: str) -> Any:
        pointers = ("source", "target", "residual", "bias", "blocks", "shifts", "masks", "index")
        kind = PTR if name in (*pointers, "scratch") else I64
        return self.k.load(kind, self.k.arguments["record"], CONV[name], 8)

    def write(self) -> None:
        k = self.k
        bounds = ("low", "high")
        self.fields = {name: self.field(name) for name in CONV.fields if name not in bounds}
        record, thread = k.arguments["record"], k.arguments["thread"]
        self.low, self.high = (k.splat(k.load(F32, record, CONV[name])) for name in bounds)
        fields = self.fields
        self.own = k.at(fields["scratch"], k.mul(fields["scratch_step"], thread))
        items = k.mul(fields["tiles"], fields["parts"])
        begin, end = k.share(items, thread, k.arguments["threads"])
        with k.loop(begin, end) as item:
            # The parts of a tile follow each other: their columns are then near already.
            tile, part = k.div(item, fields["parts"]), k.mod(item, fields["parts"])
            vector = k.add(fields["first"], k.mul(tile, self.kernel.tile))
            with k.loop(0, fields["block_count"]) as number:
                self._block(number, part, vector)
        k.done()

    def _block(self, number: Any, part: Any, vector: Any) -> None:
        k, fields = self.k, self.fields
        block = k.at(fields["blocks"], k.mul(number, BLOCK.bytes))
        here = k.shifted(vector, 6)
        if self.kernel.reading in IN_PLACE:
            base = k.at(fields["source"], k.add(k.load(I64, block, BLOCK["base"], 8), here))
        else:
            base = self.own
            columns = k.load(PTR, block, BLOCK["columns"], 8)
            with k.loop(0, k.load(I64, block, BLOCK["column_count"], 8)) as column:
                self._copy(k.at(columns, k.mul(column, COLUMN_BYTES)), column, vector)
        parts = k.load(PTR, block, BLOCK["parts"], 8)
        mine = k.at(parts, k.mul(part, PART.bytes))
        rows = k.load(PTR, mine, PART["rows"], 8)
        stream = k.variable(PTR, k.load(PTR, mine, PART["stream"], 8))
        first = k.compare(number, "==", 0)
        last = k.compare(k.add(number, 1), "==", fields["block_count"])
        with k.loop(0, k.load(I64, mine, PART["row_count"], 8)) as row:
            self._row(k.at(rows, k.mul(row, ROW_BYTES)), base, here, stream, first, last)

    def _copy(self, entry: Any, column: Any, vector: Any) -> None:
        k, fields, tile = self.k, self.fields, self.kernel.tile
        plane = k.at(fields["source"], k.wide(I32, entry))
        tap = k.wide(I32, entry, 4)
        to = k.at(self.own, k.mul(column, fields["step"]))
        first = vector
        if self.kernel.reading == "rows":  # masks are by tile, which has lines above and below
            first = k.mul(k.div(vector, tile), fields["copied"])
        at = k.add(k.mul(tap, fields["mask_step"]), first)
        if self.kernel.reading == "gather":
            indices = k.at(fields["index"], k.shifted(at, 6))
            for t in range(tile):
                chosen = k.load(INTS, indices, VECTOR_BYTES * t)
                k.store(k.gather(plane, chosen), to, VECTOR_BYTES * t, 64)
            return
        shift = k.load(I64, k.at(fields["shifts"], k.shifted(tap, 3)), 0, 8)
        start = k.at(plane, k.add(shift, k.shifted(vector, 6)))
        masks = k.at(fields["masks"], k.shifted(at, 1))
        if self.kernel.reading == "shift":
            for t in range(tile):
                self._masked(start, masks, to, VECTOR_BYTES * t, 2 * t)
        else:
            with k.loop(0, fields["copied"]) as v:
                self._masked(start, masks, to, k.shifted(v, 6), k.shifted(v, 1))

    def _masked(self, start: Any, masks: Any, to: Any, offset: Any, mask_offset: Any) -> None:
        k = self.k
        kept = k.mask(k.load(I16, masks, mask_offset, 2))
        k.store(k.where(kept, k.load(VEC, start, offset), k.zero()), to, offset, 64)

    def _row(self, entry: Any, base: Any, here: Any, stream: Any, first: Any, last: Any) -> None:
        k, kernel = self.k, self.kernel
        planes = self._planes(entry)
        outputs = [self._output(plane, here) for plane in planes]
        if kernel.rows == 1:
            self._fetch(entry, here, last)
        sums = [
            [[k.variable(kind, k.first(k.zero(), kind)) for kind in kernel.kinds] for _ in planes]
            for _ in range(kernel.sums)
        ]
        with k.when(first):
            for r, plane in enumerate(planes):
                bias = k.splat(k.load(F32, self.fields["bias"], k.shifted(plane, 2)))
                for t, kind in enumerate(kernel.kinds):
                    sums[0][r][t].set(k.first(bias, kind))
        with k.when(k.b.not_(first)):
            for r, output in enumerate(outputs):
                for t, kind in enumerate(kernel.kinds):
                    sums[0][r][t].set(k.load(kind, output, VECTOR_BYTES * t, _align(kind)))
        counts = [k.wide(I16, entry, 4), k.wide(I16, entry, 6)]
        if kernel.rows == 1:
            self._groups(counts[0], 16, base, stream, sums)
            self._groups(k.shifted(counts[1], -2), 4, base, stream, sums)
            self._groups(k.low(counts[1], 2), 1, base, stream, sums)
        else:
            self._groups(counts[0], 4, base, stream, sums)
        for r, (plane, output) in enumerate(zip(planes, outputs, strict=True)):
            self._finish([[one[r][t] for one in sums] for t in range(kernel.tile)],
                         plane, output, here, last)  # fmt: skip

    def _planes(self, entry: Any) -> list[Any]:
        """Numbers of the output planes; of fewer than four rows the last stands for the others."""
        k = self.k
        plane = k.wide(I32, entry)
        if self.kernel.rows == 1:
            return [plane]
        most = k.sub(k.wide(I16, entry, 6), 1)
        planes = []
        for r in range(self.kernel.rows):
            step = k.b.select(k.compare(most, "<", r), most, k.number(r))
            planes.append(k.add(plane, step))
        return planes

    def _output(self, plane: Any, here: Any, base: str = "target") -> Any:
        k = self.k
        offset = k.add(k.mul(plane, self.fields["pitch"]), here)
        return k.at(self.fields[base], offset)

    def _fetch(self, entry: Any, here: Any, last: Any) -> None:
        """Bring the output and the residual of a row further down near."""
        k = self.k
        plane = k.wide(I32, entry, ROW_BYTES * _ROWS_AHEAD)
        output = self._output(plane, here)
        for t in range(self.kernel.tile):
            k.prefetch(output, VECTOR_BYTES * t)
        some = k.compare(k.b.ptrtoint(self.fields["residual"], I64), "!=", 0)
        with k.when(k.b.and_(some, last)):
            residual = self._output(plane, here, "residual")
            for t in range(self.kernel.tile):
                k.prefetch(residual, VECTOR_BYTES * t)

    def _groups(self, count: Any, size: int, base: Any, stream: Any, sums: Any) -> None:
        k, kernel = self.k, self.kernel
        bytes_, framed = GROUP[size, kernel.rows], kernel.reading == "frame"
        with k.loop(0, count):
            group = stream.get()
            for ahead in range(0, bytes_, VECTOR_BYTES):
                k.prefetch(group, _AHEAD + ahead)
            full = size * kernel.rows == LANES
            weights = k.load(VEC, group) if full else None
            offsets = self._offsets(group, size)
            for i, offset in enumerate(offsets):
                at = k.at(base, k.shifted(offset, 2 if framed else 6))
                columns = [
                    k.load(kind, at, VECTOR_BYTES * t, 4 if framed else _align(kind))
                    for t, kind in enumerate(kernel.kinds)
                ]
                for r in range(kernel.rows):
                    weight = self._weight(group, weights, i * kernel.rows + r)
                    for t, column in enumerate(columns):
                        total = sums[i % kernel.sums][r][t]
                        total.set(k.fma(k.first(weight, column.type), column, total.get()))
            stream.set(k.at(group, bytes_))

    def _weight(self, group: Any, weights: Any, n: int) -> Any:
        """Weight number ``n`` of a group in every lane; ``weights``: a vector of them, if full."""
        k = self.k
        if weights is None:
            return k.splat(k.load(F32, group, 4 * n))
        if not self.kernel.permute or self.kernel.rows != 1:
            return k.lane(weights, n)
        if n not in self.indices:
            self.indices[n] = k.opaque(ir.Constant(INTS, [n] * LANES))
        return k.permuted(weights, self.indices[n])

    def _offsets(self, group: Any, size: int) -> list[Any]:
        k = self.k
        start, found = 4 * size * self.kernel.rows, []
        if size == 1:
            return [k.wide(I16, group, start)]
        for i in range(0, size, 4):
            four = k.load(I64, group, start + 2 * i, 2)
            found += [k.low(k.shifted(four, -16 * j) if j else four, 16) for j in range(4)]
        return found

    def _finish(self, sums: list[list[Any]], plane: Any, output: Any, here: Any, last: Any) -> None:
        k = self.k
        totals = []
        for parts in sums:
            total = parts[0].get()
            for part in parts[1:]:
                total = k.b.fadd(total, part.get())
            totals.append(k.variable(total.type, total))
        with k.when(last):
            some = k.compare(k.b.ptrtoint(self.fields["residual"], I64), "!=", 0)
            with k.when(some):
                residual = self._output(plane, here, "residual")
                for t, (total, kind) in enumerate(zip(totals, self.kernel.kinds, strict=True)):
                    added = k.load(kind, residual, VECTOR_BYTES * t, _align(kind))
                    total.set(k.b.fadd(total.get(), added))
            for total, kind in zip(totals, self.kernel.kinds, strict=True):
                bounds = (k.first(bound, kind) for bound in (self.low, self.high))
                total.set(k.clamp(total.get(), *bounds))
        for t, (total, kind) in enumerate(zip(totals, self.kernel.kinds, strict=True)):
            k.store(total.get(), output, VECTOR_BYTES * t, _align(kind))


def _align(kind: ir.VectorType) -> int:
    """Bytes on whose multiple a vector of a plane begins."""
    return 4 * int(kind.count)
