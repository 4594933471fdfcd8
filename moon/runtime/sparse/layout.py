"""How activations lie in memory: a plane a channel, the images of a batch one after the other.

Sixteen floats are a vector. A plane is the pixels of all images of the batch in one line, without
padding between rows or images, rounded up to whole vectors; what lies beyond the last pixel is
never read as a pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moon.runtime.sparse.ir import LANES, VECTOR_BYTES

__all__ = ["Planes"]


@dataclass(frozen=True)
class Planes:
    """The shape of an activation.

    Attributes:
        channels, images, height, width: all positive.
        slack: vectors behind each plane that may be written.
    """

    channels: int
    images: int
    height: int
    width: int
    slack: int = 0

    @property
    def pixels(self) -> int:
        """Of a plane."""
        return self.images * self.height * self.width

    @property
    def numbers(self) -> int:
        """Pixels of all planes."""
        return self.channels * self.pixels

    @property
    def vectors(self) -> int:
        """Of a plane that hold pixels."""
        return -(-self.pixels // LANES)

    @property
    def pitch(self) -> int:
        """Vectors from a plane to the next: odd above 8, so that channels do not share sets."""
        vectors = self.vectors + self.slack
        return vectors + 1 if vectors > 8 and vectors % 2 == 0 else vectors

    @property
    def nbytes(self) -> int:
        """Of all planes."""
        return self.channels * self.pitch * VECTOR_BYTES

    def with_channels(self, channels: int) -> Planes:
        """The same pixels, other channels."""
        return replace(self, channels=channels)
