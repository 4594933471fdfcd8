"""Weights as the streams that kernels read.

Shapes: n nonzeros, u units. A unit is what one list of columns serves: a row, or four rows that
follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.kernels_conv import GROUP, ROW_BYTES

__all__ = ["Entries", "Stream", "encode", "units_of"]

Ints = NDArray[np.int64]

# The kernel reads so many rows ahead, for what to fetch.
_ROWS_BEYOND = 2
# From so many nonzeros left over, a padded group of sixteen is no longer than groups of four.
_WORTH_SIXTEEN = 13
_MOST_GROUPS = np.iinfo(np.uint16).max


@dataclass(frozen=True, kw_only=True)
class Entries:
    """Nonzero weights by unit and column, sorted by unit, then column.

    Attributes:
        unit: int64 [n].
        column: int64 [n].
        weights: float32 [n, 1] or [n, 4], one for each row of the unit.
        rows: output rows in all.
    """

    unit: Ints
    column: Ints
    weights: NDArray[np.float32]
    rows: int

    @property
    def together(self) -> int:
        """Rows of a unit."""
        return int(self.weights.shape[1])

    @property
    def units(self) -> int:
        """Lists of columns."""
        return -(-self.rows // self.together)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One part of the rows in one block of columns.

    Attributes:
        rows: the table of units, uint8, most nonzeros first.
        count: units in it.
        data: groups of weights and offsets, uint8.
    """

    rows: NDArray[np.uint8]
    count: int
    data: NDArray[np.uint8]


def units_of(
    row: Ints, column: Ints, value: NDArray[np.float32], rows: int, together: int
) -> Entries:
    """Nonzeros given by row and column, gathered for units of 1 or 4 rows.

    Of the last unit's missing rows the last one stands in, so that it is computed twice and not
    something else.
    """
    if together == 1:
        order = np.lexsort((column, row))
        return Entries(unit=row[order], column=column[order], weights=value[order, None], rows=rows)
    width = int(column.max(initial=0)) + 1
    keys, which = np.unique(row // together * width + column, return_inverse=True)
    weights = np.zeros((len(keys), together), np.float32)
    weights[which, row % together] = value
    missing = -rows % together
    if missing and rows:
        last = keys // width == rows // together
        weights[last, together - missing :] = weights[last, together - missing - 1, None]
    return Entries(unit=keys // width, column=keys % width, weights=weights, rows=rows)


def encode(
    entries: Entries, bounds: Sequence[int], offsets: Ints, parts: int
) -> list[list[Stream]]:
    """Streams by block and part.

    Args:
        entries: the weights.
        bounds: where blocks of columns begin, and the number of columns.
        offsets: of each column within its block, in vectors, below 65,536; [columns].
        parts: the units are dealt to so many parts, evenly by their nonzeros.

    Raises:
        ValueError: an offset or a count does not fit its field.
    """
    if len(offsets) and not 0 <= int(offsets.min()) <= int(offsets.max()) < 1 << 16:
        raise ValueError("a column lies too far away")
    owner = _dealt(np.bincount(entries.unit, minlength=entries.units), parts)
    blocks = []
    block_of = np.searchsorted(np.asarray(bounds[1:-1]), entries.column, side="right")
    order = np.argsort(block_of, kind="stable")
    starts = np.searchsorted(block_of[order], np.arange(len(bounds)))
    for block in range(len(bounds) - 1):
        mine = order[starts[block] : starts[block + 1]]
        # All rows pass through the first block, for their bias, and the last, to be finished.
        whole = block in (0, len(bounds) - 2)
        blocks.append([_stream(entries, mine, offsets, owner == p, whole) for p in range(parts)])
    return blocks


def _dealt(nonzeros: Ints, parts: int) -> Ints:
    """The part of each unit: dealt out to and fro, the largest first."""
    place = np.arange(len(nonzeros)) % (2 * parts)
    owner = np.empty(len(nonzeros), np.int64)
    owner[np.argsort(-nonzeros, kind="stable")] = np.minimum(place, 2 * parts - 1 - place)
    return owner


def _stream(
    entries: Entries, chosen: Ints, offsets: Ints, part: NDArray[np.bool_], whole: bool
) -> Stream:
    chosen = chosen[part[entries.unit[chosen]]]
    unit = entries.unit[chosen]
    counts = np.bincount(unit, minlength=entries.units)
    units = np.flatnonzero(part & ((counts > 0) | whole))
    units = units[np.argsort(-counts[units], kind="stable")]
    counts = counts[units]
    large, small = _groups(counts, entries.together)
    table = _table(units, large, small, entries)
    # Nonzeros are sorted by unit: where those of each begin.
    begin = np.searchsorted(unit, units)
    data = _data(counts, large, small, begin, entries, chosen, offsets)
    return Stream(rows=table, count=len(units), data=data)


def _groups(counts: Ints, together: int) -> tuple[Ints, Ints]:
    """Groups of sixteen and of four nonzeros, the last one padded."""
    if together != 1:
        return np.zeros_like(counts), -(-counts // 4)
    left = counts % 16
    up = left >= _WORTH_SIXTEEN
    return counts // 16 + up, np.where(up, 0, -(-left // 4))


def _table(units: Ints, large: Ints, small: Ints, entries: Entries) -> NDArray[np.uint8]:
    if max(large.max(initial=0), small.max(initial=0)) > _MOST_GROUPS:
        raise ValueError("a row has too many nonzeros")
    table = np.zeros(
        len(units) + _ROWS_BEYOND, [("row", "<u4"), ("first", "<u2"), ("second", "<u2")]
    )
    here = table[: len(units)]
    here["row"] = units * entries.together
    if entries.together == 1:
        here["first"], here["second"] = large, small
    else:
        here["first"] = small
        here["second"] = np.minimum(entries.together, entries.rows - units * entries.together)
    assert table.itemsize == ROW_BYTES
    return table.view(np.uint8)


def _data(
    counts: Ints,
    large: Ints,
    small: Ints,
    begin: Ints,
    entries: Entries,
    chosen: Ints,
    offsets: Ints,
) -> NDArray[np.uint8]:
    together = entries.together
    big, little = GROUP.get((16, together), 0), GROUP[4, together]
    size = large * big + small * little
    data = np.zeros(int(size.sum()) // 2, np.uint16)
    slots = 16 * large + 4 * small
    if not slots.sum():
        return data.view(np.uint8)
    which = np.repeat(np.arange(len(counts)), slots)
    slot = np.arange(len(which)) - np.repeat(np.cumsum(slots) - slots, slots)
    # A padded slot has the place of the unit's last nonzero, and the weight zero.
    source = chosen[begin[which] + np.minimum(slot, counts[which] - 1)]
    weights = np.where((slot < counts[which])[:, None], entries.weights[source], 0)
    in_large = slot < 16 * large[which]
    rest = slot - 16 * large[which]
    group = np.where(in_large, slot // 16 * big, large[which] * big + rest // 4 * little)
    lane = np.where(in_large, slot % 16, rest % 4)
    start = (np.cumsum(size) - size)[which] + group
    at_weights = start // 2 + lane * 2 * together
    at_offsets = start // 2 + np.where(in_large, 16, 4) * 2 * together + lane
    halves = np.ascontiguousarray(weights, dtype="<f4").view("<u2").reshape(len(which), -1)
    for i in range(2 * together):
        data[at_weights + i] = halves[:, i]
    data[at_offsets] = offsets[entries.column[source]].astype("<u2")
    return data.view(np.uint8)
