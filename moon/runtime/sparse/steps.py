"""What a network does, as steps on named tensors; no memory, no kernels yet.

A tensor is planes (an image or feature map a channel) or rows (features, a line an image).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.frame import Frame
from moon.runtime.sparse.geometry import Geometry, Window
from moon.runtime.sparse.ir import LANES, VECTOR_BYTES
from moon.runtime.sparse.layout import Planes

__all__ = [
    "NO_HIGH", "NO_LOW", "Clamped", "Concat", "Conv", "Flatten", "Framed", "Linear",
    "Point", "Pool", "Reduce", "Rows", "Spread", "Step", "Tensor", "Unframed",
]  # fmt: skip

Floats = NDArray[np.float32]
NO_LOW, NO_HIGH = float("-inf"), float("inf")


@dataclass(frozen=True)
class Rows:
    """Features [images, features]."""

    images: int
    features: int

    @property
    def step(self) -> int:
        """Bytes from an image to the next: whole vectors."""
        return -(-self.features // LANES) * VECTOR_BYTES

    @property
    def nbytes(self) -> int:
        """Of all images."""
        return self.images * self.step


Tensor: TypeAlias = "Planes | Rows"


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One step.

    Attributes:
        source: name of what is read first.
        target: name of what is made.
        node: what to call it to a user.
    """

    source: str
    target: str
    node: str

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of all that is read."""
        return (self.source,)


@dataclass(frozen=True, kw_only=True, eq=False)
class Clamped(Step):
    """A step whose result can be clamped on the way."""

    low: float = NO_LOW
    high: float = NO_HIGH

    @property
    def clamped(self) -> bool:
        """Whether it is."""
        return (self.low, self.high) != (NO_LOW, NO_HIGH)


@dataclass(frozen=True, kw_only=True, eq=False)
class Conv(Clamped):
    """A convolution; a residual is added before the clamp."""

    weight: Floats
    bias: Floats
    window: Window
    groups: int = 1
    residual: str | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.source,) if self.residual is None else (self.source, self.residual)


@dataclass(frozen=True, kw_only=True, eq=False)
class Framed(Step):
    """Planes in a frame: what windows read."""

    frame: Frame
    fill: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Unframed(Clamped):
    """What was computed over a frame, without its margins; a residual is added before the clamp."""

    frame: Frame
    residual: str | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.source,) if self.residual is None else (self.source, self.residual)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool(Step):
    """Maxima, or averages over the pixels that ``counted`` says."""

    kind: str  # "max", "average"
    window: Window
    padding_counts: bool = False
    geometry: Geometry | None = None  # once the source is a frame, of the planes in it


@dataclass(frozen=True, kw_only=True, eq=False)
class Reduce(Step):
    """A number of each plane of each image, as planes of one pixel or as rows."""

    kind: str = "average"  # or "max"


@dataclass(frozen=True, kw_only=True, eq=False)
class Flatten(Step):
    """Planes -> rows, channel by channel."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear(Clamped):
    """Rows times weight [inputs, outputs], and bias [outputs]."""

    weight: Floats
    bias: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Point(Clamped):
    """Value by value: a kernel ``point_KIND``.

    Attributes:
        other: planes of the same shape, for add and mul.
        numbers: float32 [channels, 2], for affine.
    """

    kind: str
    other: str | None = None
    numbers: Floats | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.source,) if self.other is None else (self.source, self.other)


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread(Step):
    """Planes times one number for each image and channel."""

    other: str

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.source, self.other)


@dataclass(frozen=True, kw_only=True, eq=False)
class Concat(Step):
    """Channels one after the other; ``source`` is the first of ``sources``."""

    sources: tuple[str, ...] = field(default=())

    @property
    def reads(self) -> tuple[str, ...]:
        return self.sources
