"""Planes made ready for windows: split by phase of the strides, with margins of a fill.

In them a tap of the window is one and the same shift for every output pixel, and what lies in the
padding is there as numbers: nothing need be masked. A row of a frame is followed by a margin that
serves as the right one of this row and the left one of the next; images are parted alike.

What is computed over a frame lies as the frame does: rows as far apart, margins between them with
values that mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.geometry import Geometry
from moon.runtime.sparse.ir import LANES
from moon.runtime.sparse.layout import Planes

__all__ = ["Frame", "frame_of"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Frame:
    """How planes lie in a frame; all counted in floats.

    Attributes:
        source: the planes.
        strides: by height, width.
        phases: those there are, y * strides[1] + x; planes of a channel follow each other.
        pitch: from a row to the next.
        rows: from an image to the next.
        lead: before the first row, whole vectors.
        tail: behind the last image's rows.
    """

    source: Planes
    strides: tuple[int, int]
    phases: tuple[int, ...]
    pitch: int
    rows: int
    lead: int = 0
    tail: int = 0

    @classmethod
    def around(cls, geometry: Geometry) -> Frame:
        """With margins for a window."""
        taps, target = geometry.taps, geometry.target
        height, width = geometry.phase_size
        left, top = (max(0, -int(offset.min())) for offset in (taps.column, taps.row))
        # How far reads go beyond the last column and row of a phase.
        right = max(0, target.width - width + int(taps.column.max()))
        bottom = max(0, target.height - height + int(taps.row.max()))
        pitch = max(width + max(left, right), target.width)
        rows = max(height + max(top, bottom), target.height)
        behind = max(0, int((taps.row * pitch + taps.column).max()))
        return cls(
            source=geometry.source,
            strides=geometry.window.strides,
            phases=taps.phases,
            pitch=pitch,
            rows=rows,
            lead=-(-(top * pitch + left) // LANES) * LANES,
            tail=behind + LANES,
        )

    @classmethod
    def split(cls, geometry: Geometry) -> Frame:
        """The phases alone, without margins."""
        height, width = geometry.phase_size
        strides = geometry.window.strides
        return cls(geometry.source, strides, geometry.taps.phases, width, height)

    @cached_property
    def planes(self) -> Planes:
        """The frame as a tensor, a row of floats a plane."""
        pixels = self.lead + self.source.images * self.rows * self.pitch + self.tail
        channels = self.source.channels * len(self.phases)
        if not self.lead and not self.tail:
            return Planes(channels, self.source.images, self.rows, self.pitch, slack=1)
        return Planes(channels, 1, 1, pixels, slack=1)

    def written(self, target: Planes) -> Planes:
        """What is computed over this frame, for a target: itself where rows lie alike."""
        if (self.pitch, self.rows) == (target.width, target.height):
            return target
        rows = (target.images - 1) * self.rows + target.height
        return Planes(target.channels, 1, 1, (rows - 1) * self.pitch + target.width, slack=1)

    def shifts(self, geometry: Geometry) -> Ints:
        """From an output pixel's place to each tap's in the plane of its phase, [t]."""
        taps = geometry.taps
        found: Ints = self.lead + taps.row * self.pitch + taps.column
        return found

    def parts(self) -> Ints:
        """By phase: the first float in a source plane, columns and rows, [phases, 3]."""
        y, x = np.divmod(np.array(self.phases), self.strides[1])
        rows = -(-(self.source.height - y) // self.strides[0])
        return np.stack([y * self.source.width + x, self.source.width - x, rows], axis=1)


def frame_of(geometry: Geometry, reading: str) -> Frame | None:
    """The frame in which a convolution reads its source; None where it reads it as it is."""
    if reading == "frame":
        return Frame.around(geometry)
    if reading == "gather" or geometry.window.strides == (1, 1):
        return None
    return Frame.split(geometry)
