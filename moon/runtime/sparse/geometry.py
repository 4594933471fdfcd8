"""Where the pixels of a convolution's taps lie, as shifts, masks and indices.

Shapes: t taps, p output pixels of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.ir import LANES
from moon.runtime.sparse.layout import Planes

__all__ = ["Geometry", "Taps", "Window", "packed"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """What ONNX calls the attributes of a convolution or pooling.

    Attributes:
        kernel, strides, dilations: by height, width.
        pads: top, left, bottom, right.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    def output(self, height: int, width: int, *, ceil: bool = False) -> tuple[int, int]:
        """Height and width of what comes out; not positive where the window does not fit."""
        sizes = []
        for i, size in enumerate((height, width)):
            extent = self.dilations[i] * (self.kernel[i] - 1) + 1
            room = size + self.pads[i] + self.pads[i + 2] - extent
            steps = -(-room // self.strides[i]) if ceil else room // self.strides[i]
            # A window that would begin in the padding at the end does not count.
            if ceil and steps * self.strides[i] >= size + self.pads[i]:
                steps -= 1
            sizes.append(steps + 1)
        return sizes[0], sizes[1]

    @property
    def taps(self) -> int:
        """Places of the kernel."""
        return self.kernel[0] * self.kernel[1]


@dataclass(frozen=True, eq=False)
class Taps:
    """Taps by the phase they read.

    Attributes:
        phases: that any tap reads, y * stride + x.
        phase: of each tap, its place among them, [t].
        row, column: by how many rows and columns of its phase each tap is off, [t].
    """

    phases: tuple[int, ...]
    phase: Ints
    row: Ints
    column: Ints

    @cached_property
    def kinds(self) -> tuple[Ints, Ints]:
        """The kind of each tap, [t], and the first tap of each kind.

        Taps of one phase and one column of the kernel are of one kind.
        """
        columns = self.column - self.column.min()
        keys = self.phase * (int(columns.max()) + 1) + columns
        _, first, kind = np.unique(keys, return_index=True, return_inverse=True)
        return kind, first


@dataclass(frozen=True)
class Geometry:
    """A window over planes.

    Attributes:
        source: what is read.
        window: the taps.
        target: what is written; its channels do not matter here.
    """

    source: Planes
    window: Window
    target: Planes

    @cached_property
    def offsets(self) -> tuple[Ints, Ints]:
        """Rows and columns of each tap from the pixel at the stride's multiple, [t]."""
        window = self.window
        y, x = np.divmod(np.arange(window.taps), window.kernel[1])
        return y * window.dilations[0] - window.pads[0], x * window.dilations[1] - window.pads[1]

    @cached_property
    def flat(self) -> bool:
        """Whether a tap is the same shift for all output pixels, in planes split by phase."""
        if (self.target.height, self.target.width) != self.phase_size:
            return False
        # Planes of very few pixels would be split into nearly empty ones.
        return self.phased.nbytes <= 8 * self.source.nbytes + (1 << 16)

    @property
    def phase_size(self) -> tuple[int, int]:
        """Height and width of the planes of a phase, a position modulo the strides."""
        strides = self.window.strides
        return -(-self.source.height // strides[0]), -(-self.source.width // strides[1])

    @property
    def phased(self) -> Planes:
        """The source split by the phases that taps read; those of a channel follow each other."""
        if self.window.strides == (1, 1):
            return self.source
        height, width = self.phase_size
        channels = self.source.channels * len(self.taps.phases)
        return Planes(channels, self.source.images, height, width, slack=1)

    @cached_property
    def taps(self) -> Taps:
        """Where the taps lie in the planes of their phases."""
        sy, sx = self.window.strides
        dy, dx = self.offsets
        phases, which = np.unique(dy % sy * sx + dx % sx, return_inverse=True)
        return Taps(tuple(int(phase) for phase in phases), which, dy // sy, dx // sx)

    @cached_property
    def indices(self) -> NDArray[np.int32]:
        """The source pixel of each tap and output pixel, -1 in the padding, [t, p].

        Counted in the plane as it lies, p filled up to whole vectors with -1.
        """
        if self.source.pixels >= 1 << 31:
            raise ValueError("a plane has too many pixels for an index")
        one = self._pixels.astype(np.int32)
        image = np.arange(self.target.images, dtype=np.int32)[None, :, None]
        image *= self.source.height * self.source.width
        every = np.where(one >= 0, one + image, -1).reshape(len(one), -1)
        found = np.full((len(one), self.target.vectors * LANES), -1, np.int32)
        found[:, : every.shape[1]] = every
        return found

    @cached_property
    def _pixels(self) -> Ints:
        """Source pixels of the first image, -1 in the padding, [t, 1, p of it]."""
        planes, strides, offsets = self.source, self.window.strides, self.offsets
        y = np.arange(self.target.height)[:, None] * strides[0]
        x = np.arange(self.target.width)[None, :] * strides[1]
        rows, columns = y + offsets[0][:, None, None], x + offsets[1][:, None, None]
        inside = (rows >= 0) & (rows < planes.height) & (columns >= 0) & (columns < planes.width)
        pixels: Ints = np.where(inside, rows * planes.width + columns, -1)
        return pixels.reshape(self.window.taps, 1, -1)

    @cached_property
    def shifts(self) -> Ints:
        """Bytes from an output pixel's place to each tap's, in planes by phase, [t]."""
        found: Ints = (self.taps.row * self.phase_size[1] + self.taps.column) * 4
        return found

    @cached_property
    def masks(self) -> NDArray[np.uint16]:
        """Which lanes of each tap and vector are pixels, [t, vectors]."""
        one = self._pixels >= 0
        lanes = np.zeros((len(one), self.target.vectors * LANES), np.bool_)
        lanes[:, : self.target.pixels] = np.tile(one[:, 0], (1, self.target.images))
        return packed(lanes)

    @property
    def reach(self) -> tuple[int, int]:
        """Bytes that shifted reads reach before the first plane and beyond the last."""
        return max(0, -int(self.shifts.min())), max(0, int(self.shifts.max()))


def packed(lanes: NDArray[np.bool_]) -> NDArray[np.uint16]:
    """Truth values [rows, 16 n] as bits, lane 0 the lowest: [rows, n]."""
    found: NDArray[np.uint16] = np.packbits(lanes, axis=1, bitorder="little").view("<u2")
    return np.ascontiguousarray(found)
