"""Records that native code reads: named fields of eight bytes each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Layout", "Record", "address"]


class Layout:
    """Names of fields in order; every field takes eight bytes."""

    def __init__(self, *fields: str) -> None:
        self.fields = fields
        self.bytes = 8 * len(fields)
        self._at = {name: 8 * i for i, name in enumerate(fields)}

    def __getitem__(self, name: str) -> int:
        """Byte offset of a field."""
        return self._at[name]

    def record(self, **values: Any) -> Record:
        """One record; every field must be given."""
        return Record(self, values)

    def table(self, rows: list[dict[str, int]]) -> NDArray[np.int64]:
        """Records one after the other, [rows, fields]."""
        return np.array(
            [[row[name] for name in self.fields] for row in rows], dtype=np.int64
        ).reshape(len(rows), len(self.fields))


class Record:
    """One record. Pointers are kept valid by holding on to the arrays behind them."""

    def __init__(self, layout: Layout, values: dict[str, Any]) -> None:
        if set(values) != set(layout.fields):
            raise ValueError(f"a record of {layout.fields} cannot be made of {tuple(values)}")
        self._layout = layout
        self._kept: dict[str, Any] = {}
        self.data = np.zeros(len(layout.fields), np.int64)
        for name, value in values.items():
            self.set(name, value)

    def set(self, name: str, value: Any) -> None:
        """An integer, a float (stored as float32), an array (its address) or None (0)."""
        at = self._layout[name] // 8
        self._kept.pop(name, None)
        if isinstance(value, np.ndarray):
            self._kept[name] = value
            self.data[at] = address(value)
        elif isinstance(value, float):
            self.data[at] = np.array([value, 0], np.float32).view(np.int64)[0]
        else:
            self.data[at] = 0 if value is None else value

    @property
    def address(self) -> int:
        """Of the record itself."""
        return address(self.data)


def address(array: NDArray[Any]) -> int:
    """Where the first byte of a contiguous array lies."""
    if not array.flags.c_contiguous:
        raise ValueError("native code reads contiguous arrays only")
    return int(array.ctypes.data)
