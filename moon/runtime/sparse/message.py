"""One message of an ONNX file, read strictly.

Stricter than protobuf asks, because readers differ where it is lenient: a field that stands
twice where one is meant, or with another wire type, is refused instead of merged or skipped.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError
from moon.wire import BYTES, FIXED32, FIXED64, VARINT, Field, WireError, fields, varints

__all__ = ["Budget", "Message", "damaged", "unsupported"]

# Far more than any network needs, few enough to walk in seconds.
_MOST_FIELDS = 2_000_000
_CHUNK = 1 << 20


def damaged(cause: str) -> BackendError:
    return BackendError(
        f"the ONNX file is damaged: {cause}", remedy="Take a good copy, or export it again"
    )


def unsupported(cause: str) -> BackendError:
    return BackendError(
        f"the sparse engine does not read this ONNX file: {cause}",
        remedy="Run it with ONNX Runtime",
    )


class Budget:
    """How many more fields, and bytes beyond those of the file, reading may take."""

    def __init__(self, bytes_: int) -> None:
        self._fields = _MOST_FIELDS
        self._bytes = bytes_

    def take_fields(self, count: int = 1) -> None:
        self._fields -= count
        if self._fields < 0:
            raise unsupported("it has too many parts")

    def take_bytes(self, count: int, what: str) -> None:
        """Ask for ``count`` bytes of memory before they are allocated."""
        self._bytes -= count
        if self._bytes < 0:
            raise unsupported(f"{what} needs more memory than a file of its size could")


class Message:
    """The fields of the message in ``data[start:end]``, by number.

    Raises:
        BackendError: malformed; every method, too.
    """

    def __init__(self, data: bytes, start: int, end: int, budget: Budget) -> None:
        self.data = data
        self.budget = budget
        self._start, self._end = start, end
        self._fields: dict[int, list[Field]] = {}
        try:
            for field in fields(data, start, end):
                budget.take_fields()
                self._fields.setdefault(field.number, []).append(field)
        except WireError as error:
            raise damaged(str(error)) from error

    def raw(self) -> bytes:
        """The message's own bytes, without what announces it."""
        return self.data[self._start : self._end]

    def has(self, number: int) -> bool:
        return number in self._fields

    def many(self, number: int) -> list[Field]:
        """The occurrences of a field of bytes."""
        found = self._fields.get(number, [])
        for field in found:
            if field.wire != BYTES:
                raise damaged(f"field {number} has wire type {field.wire}")
        return found

    def one(self, number: int, wire: int = BYTES) -> Field | None:
        """The only occurrence of a field, or None."""
        found = self._fields.get(number)
        if found is None:
            return None
        if len(found) > 1 or found[0].wire != wire:
            raise damaged(f"field {number} stands there twice or with another type")
        return found[0]

    def child(self, number: int) -> Message | None:
        field = self.one(number)
        return None if field is None else self._message(field)

    def children(self, number: int) -> list[Message]:
        return [self._message(field) for field in self.many(number)]

    def text(self, number: int) -> str:
        """The text of a field, "" where it is missing."""
        field = self.one(number)
        return "" if field is None else self._text(field)

    def texts(self, number: int) -> tuple[str, ...]:
        return tuple(self._text(field) for field in self.many(number))

    def integer(self, number: int) -> int:
        """The signed integer of a field, 0 where it is missing."""
        field = self.one(number, VARINT)
        return 0 if field is None else _signed(field.value)

    def integers(self, number: int) -> tuple[int, ...]:
        """The signed integers of a repeated field, packed or not, of a graph's description."""
        values: list[int] = []
        for field in self._fields.get(number, []):
            if field.wire not in (VARINT, BYTES):
                raise damaged(f"field {number} has wire type {field.wire}")
            self.budget.take_fields(field.end - field.start)
            try:
                values += varints(self.data, field)
            except WireError as error:
                raise damaged(str(error)) from error
        return tuple(map(_signed, values))

    def real(self, number: int) -> float:
        """The float32 of a field, 0 where it is missing."""
        field = self.one(number, FIXED32)
        return 0.0 if field is None else float(struct.unpack_from("<f", self.data, field.start)[0])

    def fixed(self, number: int, dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        """The numbers of fixed width of a repeated field; where it can be, a view of the file."""
        found = self._fields.get(number, [])
        width, single = dtype.itemsize, FIXED32 if dtype.itemsize == 4 else FIXED64
        for field in found:
            if field.wire not in (BYTES, single) or (field.end - field.start) % width:
                raise damaged(f"field {number} is no list of numbers of {width} bytes")
        if len(found) == 1:
            start, end = found[0].start, found[0].end
            return np.frombuffer(self.data, dtype, (end - start) // width, start)
        return np.frombuffer(b"".join(self.data[f.start : f.end] for f in found), dtype)

    def numbers(self, number: int, count: int) -> NDArray[np.uint64]:
        """The ``count`` numbers of a long repeated field, packed or not, as 64 bits each."""
        found = self._fields.get(number, [])
        # Each takes a byte at least.
        if sum(max(field.end - field.start, 1) for field in found) < count:
            raise damaged(f"field {number} holds fewer numbers than {count}")
        self.budget.take_bytes(16 * count, f"field {number}")
        out = np.empty(count, np.uint64)
        filled = 0
        for field in found:
            if field.wire == VARINT and filled < count:
                out[filled] = field.value
                filled += 1
            elif field.wire == BYTES:
                filled = _unpack(self.data, field, out, filled)
            else:
                raise damaged(f"field {number} holds other numbers than the shape asks for")
        if filled != count:
            raise damaged(f"field {number} holds {filled} numbers instead of {count}")
        return out

    def _message(self, field: Field) -> Message:
        return Message(self.data, field.start, field.end, self.budget)

    def _text(self, field: Field) -> str:
        try:
            return self.data[field.start : field.end].decode()
        except UnicodeDecodeError as error:
            raise damaged("a name is not UTF-8") from error


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _unpack(data: bytes, field: Field, out: NDArray[np.uint64], filled: int) -> int:
    """Decode packed varints behind the ``filled`` there are; in chunks, to bound the memory."""
    at = field.start
    while at < field.end:
        block = np.frombuffer(data, np.uint8, min(_CHUNK, field.end - at), at)
        ends = np.flatnonzero(block < 0x80)
        if not len(ends) or filled + len(ends) > len(out):
            raise damaged("a list of numbers does not end where it should, or is too long")
        starts = np.concatenate([[0], ends[:-1] + 1])
        widths = ends - starts + 1
        if widths.max() > 10:
            raise damaged("it ends in the middle of a number")
        values = (block[starts] & 0x7F).astype(np.uint64)
        for place in range(1, int(widths.max())):
            longer = np.flatnonzero(widths > place)
            part = (block[starts[longer] + place] & 0x7F).astype(np.uint64)
            values[longer] |= part << np.uint64(7 * place)
        out[filled : filled + len(values)] = values
        filled += len(values)
        at += int(ends[-1]) + 1
    return filled
