"""Weights as the streams that kernels read.

Shapes: n nonzeros, u units. A unit is what one list of columns serves: a row, or four rows that
follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

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
# Groups by size: how many of them each unit has.
Groups: TypeAlias = "dict[int, Ints]"


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
    entries: Entries, bounds: Sequence[int], offsets: Ints, parts: int, *, exact: bool = False
) -> list[list[Stream]]:
    """Streams by block and part.

    Args:
        entries: the weights.
        bounds: where blocks of columns begin, and the number of columns.
        offsets: of each column within its block, below 65,536; [columns].
        parts: the units are dealt to so many parts, evenly by their nonzeros.
        exact: no group is padded, which is worth it where a nonzero takes several multiply-adds.

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
        blocks.append(
            [_stream(entries, mine, offsets, owner == p, whole, exact) for p in range(parts)]
        )
    return blocks


def _dealt(nonzeros: Ints, parts: int) -> Ints:
    """The part of each unit: dealt out to and fro, the largest first."""
    place = np.arange(len(nonzeros)) % (2 * parts)
    owner = np.empty(len(nonzeros), np.int64)
    owner[np.argsort(-nonzeros, kind="stable")] = np.minimum(place, 2 * parts - 1 - place)
    return owner


def _stream(
    entries: Entries,
    chosen: Ints,
    offsets: Ints,
    part: NDArray[np.bool_],
    whole: bool,
    exact: bool,
) -> Stream:
    chosen = chosen[part[entries.unit[chosen]]]
    unit = entries.unit[chosen]
    counts = np.bincount(unit, minlength=entries.units)
    units = np.flatnonzero(part & ((counts > 0) | whole))
    units = units[np.argsort(-counts[units], kind="stable")]
    counts = counts[units]
    groups = _groups(counts, entries.together, exact)
    # Nonzeros are sorted by unit: where those of each begin.
    begin = np.searchsorted(unit, units)
    data = _data(counts, groups, begin, entries, chosen, offsets)
    return Stream(rows=_table(units, groups, entries), count=len(units), data=data)


def _groups(counts: Ints, together: int, exact: bool) -> Groups:
    """Groups as they follow each other; the last one is padded."""
    if together != 1:
        return {4: -(-counts // 4)}
    left = counts % 16
    if exact:
        return {16: counts // 16, 4: left // 4, 1: left % 4}
    up = left >= _WORTH_SIXTEEN
    return {16: counts // 16 + up, 4: np.where(up, 0, -(-left // 4)), 1: np.zeros_like(counts)}


def _table(units: Ints, groups: Groups, entries: Entries) -> NDArray[np.uint8]:
    fields = [("row", "<u4"), ("first", "<u2"), ("second", "<u2")]
    table = np.zeros(len(units) + _ROWS_BEYOND, fields)
    if entries.together == 1:
        first, second = groups[16], 4 * groups[4] + groups[1]
    else:
        first = groups[4]
        second = np.minimum(entries.together, entries.rows - units * entries.together)
    if max(first.max(initial=0), second.max(initial=0)) > _MOST_GROUPS:
        raise ValueError("a row has too many nonzeros")
    here = table[: len(units)]
    here["row"], here["first"], here["second"] = units * entries.together, first, second
    assert table.itemsize == ROW_BYTES
    return table.view(np.uint8)


def _data(
    counts: Ints, groups: Groups, begin: Ints, entries: Entries, chosen: Ints, offsets: Ints
) -> NDArray[np.uint8]:
    together = entries.together
    sizes = sum(number * GROUP[size, together] for size, number in groups.items())
    data = np.zeros(int(np.sum(sizes)) // 2, np.uint16)
    at, done = np.cumsum(sizes) - sizes, np.zeros_like(counts)
    for size, number in groups.items():
        slots = number * size
        which = np.repeat(np.arange(len(counts)), slots)
        slot = np.arange(len(which)) - np.repeat(np.cumsum(slots) - slots, slots)
        # A padded slot has the place of the unit's last nonzero, and the weight zero.
        place = done[which] + slot
        source = chosen[begin[which] + np.minimum(place, counts[which] - 1)]
        weights = np.where((place < counts[which])[:, None], entries.weights[source], 0)
        start = (at[which] + slot // size * GROUP[size, together]) // 2
        at_weights = start + slot % size * 2 * together
        halves = (
            np.ascontiguousarray(weights, dtype="<f4").view("<u2").reshape(len(which), 2 * together)
        )
        for i in range(2 * together):
            data[at_weights + i] = halves[:, i]
        at_offsets = start + size * 2 * together + slot % size
        data[at_offsets] = offsets[entries.column[source]].astype("<u2")
        at, done = at + number * GROUP[size, together], done + slots
    return data.view(np.uint8)
