"""Memory that native code works on: where tensors lie, and what lies around them.

Tensors share one arena, places taken again when a tensor is read no more. For finding errors
there is another way: everything lies alone, its end or its beginning beside a page that cannot
be touched, all of it filled with NaN at first.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError, UsageError
from moon.runtime.sparse.ir import VECTOR_BYTES

__all__ = ["GUARD", "Arena", "Guard", "Life", "Reach", "Space", "aligned", "arrange"]

# The environment variable: 1 or "after" for pages after, "before" for pages before.
GUARD = "MOON_ENGINE_GUARD"
Guard = Literal["", "after", "before"]
_GUARDS: Mapping[str, Guard] = {
    "": "", "0": "", "1": "after", "after": "after", "before": "before"
}  # fmt: skip
_PAGE = mmap.PAGESIZE
_LARGE_PAGE = 2 << 20
_WORTH_LARGE_PAGES = 1 << 20
_Number = TypeVar("_Number", bound=np.generic)


class Reach(NamedTuple):
    """Bytes that may be read before and after a tensor; what is there does not matter."""

    before: int = 0
    after: int = 0

    def with_(self, other: Reach) -> Reach:
        """Both."""
        return Reach(max(self.before, other.before), max(self.after, other.after))


@dataclass(frozen=True)
class Life:
    """How long a tensor is needed.

    Attributes:
        nbytes: its size.
        first, last: the steps that write it first and read it last.
    """

    nbytes: int
    first: int
    last: int


def arrange(lives: Mapping[str, Life]) -> tuple[dict[str, int], int]:
    """Offsets, and the bytes of all: tensors of overlapping lives do not overlap.

    The largest are placed first, each in the smallest gap it fits.
    """
    placed: list[tuple[int, int, Life]] = []
    offsets: dict[str, int] = {}
    for name, life in sorted(lives.items(), key=lambda item: (-item[1].nbytes, item[1].first)):
        size = _up(life.nbytes, VECTOR_BYTES)
        busy = sorted(
            (start, end)
            for start, end, other in placed
            if other.first <= life.last and life.first <= other.last
        )
        offsets[name] = start = _gap(busy, size)
        placed.append((start, start + size, life))
    return offsets, max((end for _, end, _ in placed), default=0)


def _gap(busy: Sequence[tuple[int, int]], size: int) -> int:
    best: tuple[int, int] | None = None
    at = 0
    for start, end in busy:
        if start - at >= size and (best is None or start - at < best[0]):
            best = (start - at, at)
        at = max(at, end)
    return at if best is None else best[1]


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def aligned(nbytes: int, reach: Reach = Reach()) -> NDArray[np.uint8]:  # noqa: B008, immutable
    """Zeroed bytes from a page's start on, with room around them."""
    before = _up(reach.before, _PAGE)
    try:
        if nbytes >= _WORTH_LARGE_PAGES:
            raw = _on_large_pages(nbytes + before + reach.after)
            return raw[before : before + nbytes]
        raw = np.zeros(nbytes + before + reach.after + _PAGE, np.uint8)
    except (MemoryError, OSError, OverflowError, ValueError) as error:
        raise BackendError(
            f"there is no memory for {nbytes} bytes of the engine's",
            remedy="Run fewer images at a time, or on a larger machine",
        ) from error
    start = -raw.ctypes.data % _PAGE + before
    return raw[start : start + nbytes]


def _on_large_pages(nbytes: int) -> NDArray[np.uint8]:
    """Zeroed bytes, on pages of 2 MiB where the system has them.

    A tile reads a little of each of many planes: on pages of 4 KiB their addresses alone would
    not fit in a core's first table of pages.
    """
    private = getattr(mmap, "MAP_PRIVATE", None)
    if private is None:
        return np.zeros(nbytes, np.uint8)
    size = _up(nbytes, _LARGE_PAGE)
    memory = mmap.mmap(-1, size + _LARGE_PAGE, flags=private | mmap.MAP_ANONYMOUS)
    raw = np.frombuffer(memory, np.uint8)
    start = -raw.ctypes.data % _LARGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, start, size)
    return raw[start : start + nbytes]


class Space:
    """Gives memory.

    Args:
        guard: where pages are that cannot be touched; None for what MOON_ENGINE_GUARD says.

    Raises:
        UsageError: the variable says something else.
    """

    def __init__(self, guard: Guard | None = None) -> None:
        wanted = os.environ.get(GUARD, "") if guard is None else guard
        if wanted not in _GUARDS:
            raise UsageError(f"{GUARD} is {wanted!r}", remedy=f"Use one of {', '.join(_GUARDS)}")
        self.guard = _GUARDS[wanted]

    def take(self, nbytes: int, reach: Reach = Reach()) -> NDArray[np.uint8]:  # noqa: B008
        """Memory for tensors, on a vector's bound."""
        if not self.guard:
            return aligned(nbytes, reach)
        return _guarded(nbytes, reach, self.guard, VECTOR_BYTES)

    def table(self, array: NDArray[_Number]) -> NDArray[_Number]:
        """The same values, contiguous, where native code may read them and nothing else."""
        array = np.ascontiguousarray(array)
        if not self.guard:
            return array
        memory = _guarded(array.nbytes, Reach(), self.guard, array.itemsize)
        placed = memory.view(array.dtype).reshape(array.shape)
        placed[...] = array
        return placed


def _guarded(nbytes: int, reach: Reach, guard: Guard, unit: int) -> NDArray[np.uint8]:
    """Memory at a multiple of ``unit`` with a page before and after it that faults."""
    size = _up(max(1, nbytes + unit + reach.before + reach.after), _PAGE)
    raw: NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, size + 2 * _PAGE), np.uint8)
    raw[:] = 0xFF
    protect: Any = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (0, size + _PAGE):
        where = ctypes.c_void_p(raw.ctypes.data + page)
        if protect(where, ctypes.c_size_t(_PAGE), 0):
            raise OSError(ctypes.get_errno(), "a page cannot be protected")
    if guard == "after":
        start = (_PAGE + size - reach.after - nbytes) // unit * unit
    else:
        start = _up(_PAGE + reach.before, unit)
    return raw[start : start + nbytes]


class Arena:
    """Memory for tensors.

    Args:
        lives: of the tensors, by name.
        reaches: how far reads go beyond some of them, by name.
        space: what gives the memory.
    """

    def __init__(
        self, lives: Mapping[str, Life], reaches: Mapping[str, Reach], space: Space
    ) -> None:
        self._tensors: dict[str, NDArray[np.uint8]] = {}
        if space.guard:
            for name, life in lives.items():
                self._tensors[name] = space.take(life.nbytes, reaches.get(name, Reach()))
            self.nbytes = sum(tensor.nbytes for tensor in self._tensors.values())
            return
        offsets, self.nbytes = arrange(lives)
        most = Reach()
        for reach in reaches.values():
            most = most.with_(reach)
        memory = space.take(self.nbytes, most)
        for name, life in lives.items():
            self._tensors[name] = memory[offsets[name] : offsets[name] + life.nbytes]

    def floats(self, name: str) -> NDArray[np.float32]:
        """A tensor's memory."""
        return self._tensors[name].view(np.float32)
