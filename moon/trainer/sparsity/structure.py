"""What a layer's connections may look like: any, N of M, blocks, or equal rows.

A structure cuts a weight [O, I, *kernel] into *units*, the connections that live and die
together, and puts the units into *groups* of which at most ``cap`` units live. Rules choose
among units and never see the weight's own shape. Importing this needs no torch, so that
recipes can name a structure where torch is not installed.

Shape suffixes: G groups, U units of a group, O output channels, I input channels of a group
of the convolution.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moon.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["UNSTRUCTURED", "Structure", "parse_structure", "structure_names"]

Shape = tuple[int, ...]

BLOCK = 4


class Structure(Protocol):
    """What connections a weight may have.

    A weight may fall into several *parts*, whose numbers of units never change; the lists
    below hold one entry a part.
    """

    @property
    def name(self) -> str:
        """As ``parse_structure`` takes it."""

    @property
    def full(self) -> float | None:
        """The density at which every group of every layer is full; None where that is 1."""

    def misfit(self, shape: Shape, groups: int) -> str:
        """Why a weight of this shape, of a convolution in ``groups``, cannot have it, or ""."""

    def limit(self, shape: Shape) -> float:
        """The largest density of a weight."""

    def count(self, shape: Shape, density: float) -> int:
        """Connections nearest to ``density`` that the structure can hold, at least one unit."""

    def units(self, shape: Shape, nonzeros: int) -> tuple[int, ...]:
        """Units a part of a weight with ``nonzeros`` connections, as ``count`` gives them."""

    def cap(self, shape: Shape, nonzeros: int) -> int | None:
        """The most units of one group, or None for no bound."""

    def scores(self, values: Tensor) -> list[Tensor]:
        """Sum of ``values`` (none negative) over each unit: [G, U] a part; -1 is no unit."""

    def flags(self, mask: Tensor) -> list[Tensor]:
        """Whether each unit lives, by its first connection: bool [G, U] a part."""

    def join(self, flags_GU: list[Tensor], shape: Shape) -> Tensor:
        """The mask of the living units: bool, contiguous, of the weight's shape."""


class _Free:
    """What holds unless a structure says otherwise: one part, of single connections, no bound."""

    @property
    def full(self) -> float | None:
        return None

    def misfit(self, shape: Shape, groups: int) -> str:
        return ""

    def limit(self, shape: Shape) -> float:
        return 1.0

    def units(self, shape: Shape, nonzeros: int) -> tuple[int, ...]:
        return (nonzeros,)

    def cap(self, shape: Shape, nonzeros: int) -> int | None:
        return None

    def join(self, flags_GU: list[Tensor], shape: Shape) -> Tensor:
        return flags_GU[0].view(shape)


@dataclass(frozen=True)
class _Unstructured(_Free):
    """Every connection by itself."""

    name = "unstructured"

    def count(self, shape: Shape, density: float) -> int:
        return max(1, round(density * math.prod(shape)))

    def scores(self, values: Tensor) -> list[Tensor]:
        return [values.reshape(1, -1)]

    def flags(self, mask: Tensor) -> list[Tensor]:
        return [mask.reshape(1, -1)]


@dataclass(frozen=True)
class _Capped(_Free):
    """At most ``kept`` of every ``window`` consecutive input channels (2:4: TensorRT).

    Per output channel and kernel position; a last, incomplete window of r channels holds at
    most min(kept, r).
    """

    kept: int
    window: int

    @property
    def name(self) -> str:
        return f"{self.kept}:{self.window}"

    @property
    def full(self) -> float | None:
        return self.kept / self.window

    def misfit(self, shape: Shape, groups: int) -> str:
        if shape[1] >= self.window:
            return ""
        return f"has {shape[1]} input channel{'s'[: shape[1] != 1]}, fewer than {self.window}"

    def limit(self, shape: Shape) -> float:
        windows, rest = divmod(shape[1], self.window)
        return (windows * self.kept + min(self.kept, rest)) / shape[1]

    def count(self, shape: Shape, density: float) -> int:
        size = math.prod(shape)
        return max(1, min(round(density * size), round(self.limit(shape) * size)))

    def cap(self, shape: Shape, nonzeros: int) -> int | None:
        return self.kept

    def scores(self, values: Tensor) -> list[Tensor]:
        return [self._windows(values, -1.0)]

    def flags(self, mask: Tensor) -> list[Tensor]:
        return [self._windows(mask, False)]

    def join(self, flags_GU: list[Tensor], shape: Shape) -> Tensor:
        outputs, channels, *kernel = shape
        rows = flags_GU[0].view(outputs, *kernel, -1)
        return rows[..., :channels].movedim(-1, 1).contiguous()

    def _windows(self, values: Tensor, filler: float | bool) -> Tensor:
        rows = values.movedim(1, -1)
        missing = -rows.shape[-1] % self.window
        if missing:
            padded = rows.new_full((*rows.shape[:-1], rows.shape[-1] + missing), filler)
            padded[..., : rows.shape[-1]] = rows
            rows = padded
        return rows.reshape(-1, self.window)


@dataclass(frozen=True)
class _Blocks(_Free):
    """Blocks of 4 consecutive output channels at one input channel live and die together.

    Output channels left over are a second part, whose blocks have their height.
    """

    name = "block4x1"

    def misfit(self, shape: Shape, groups: int) -> str:
        if shape[0] < BLOCK:
            return f"has {shape[0]} output channels, fewer than {BLOCK}"
        if groups > 1 and shape[0] // groups % BLOCK:
            return f"has groups of {shape[0] // groups} output channels, no multiple of {BLOCK}"
        return ""

    def count(self, shape: Shape, density: float) -> int:
        blocks, rest = divmod(shape[0], BLOCK)
        width = math.prod(shape[1:])
        found = BLOCK * round(density * blocks * width) + rest * round(density * width)
        return max(BLOCK, found)

    def units(self, shape: Shape, nonzeros: int) -> tuple[int, ...]:
        blocks, rest = divmod(shape[0], BLOCK)
        width = math.prod(shape[1:])
        if not rest:
            return (nonzeros // BLOCK,)
        # Several pairs add up to ``nonzeros``: the one nearest to equal densities is it.
        ideal = nonzeros / math.prod(shape) * width
        found = [
            (abs(low - ideal), (nonzeros - rest * low) // BLOCK, low)
            for low in range(max(0, int(ideal) - BLOCK), min(width, int(ideal) + 2 * BLOCK) + 1)
            if (nonzeros - rest * low) % BLOCK == 0
            and 0 <= nonzeros - rest * low <= BLOCK * blocks * width
        ]
        return min(found)[1:]

    def scores(self, values: Tensor) -> list[Tensor]:
        # Half precision would lose the smaller members of a sum.
        exact = values.float() if values.element_size() < 4 else values
        return [part.sum(1).view(1, -1) for part in self._cut(exact)]

    def flags(self, mask: Tensor) -> list[Tensor]:
        return [part[:, 0].reshape(1, -1) for part in self._cut(mask)]

    def join(self, flags_GU: list[Tensor], shape: Shape) -> Tensor:
        mask = flags_GU[0].new_empty(shape)
        for part, flags in zip(self._cut(mask), flags_GU, strict=True):
            part.copy_(flags.view(len(part), 1, -1).expand_as(part))
        return mask

    def _cut(self, values: Tensor) -> list[Tensor]:
        """Views [blocks, height, width] of a weight's parts."""
        rows = values.reshape(len(values), -1)
        whole = len(rows) // BLOCK * BLOCK
        parts = [rows[:whole].view(-1, BLOCK, rows.shape[1])]
        return parts if whole == len(rows) else [*parts, rows[whole:].unsqueeze(0)]


@dataclass(frozen=True)
class _FanIn(_Free):
    """Every output channel has the same number of connections (Lasby et al. 2023, SRigL)."""

    name = "fan-in"

    def count(self, shape: Shape, density: float) -> int:
        return shape[0] * max(1, round(density * math.prod(shape[1:])))

    def cap(self, shape: Shape, nonzeros: int) -> int | None:
        return nonzeros // shape[0]

    def scores(self, values: Tensor) -> list[Tensor]:
        return [values.reshape(len(values), -1)]

    def flags(self, mask: Tensor) -> list[Tensor]:
        return [mask.reshape(len(mask), -1)]


UNSTRUCTURED: Structure = _Unstructured()

_NAMED: dict[str, Structure] = {s.name: s for s in (_Unstructured(), _Blocks(), _FanIn())}


def structure_names() -> tuple[str, ...]:
    """What ``parse_structure`` takes, in words."""
    return ("unstructured", "N:M such as 2:4", "block4x1", "fan-in")


def parse_structure(text: str) -> Structure:
    """A structure by its name.

    ``unstructured``; ``N:M`` (N < M): at most N connections among M consecutive input
    channels; ``block4x1``: blocks of 4 output channels; ``fan-in``: as many connections in
    every output channel.

    Raises:
        UsageError: no such structure.
    """
    if text in _NAMED:
        return _NAMED[text]
    found = re.fullmatch(r"([1-9][0-9]*):([1-9][0-9]*)", str(text))
    if found and int(found[1]) < int(found[2]):
        return _Capped(int(found[1]), int(found[2]))
    names = structure_names()
    raise UsageError(
        f"unknown structure {text!r}",
        remedy=f"Use {', '.join(names[:-1])} or {names[-1]}; in N:M, N is at least 1 and below M",
    )
