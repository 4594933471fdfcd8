"""Protocol buffers on the wire: walking the fields of a message, and writing them.

Knows no schema: numbers, wire types and where payloads lie. Damaged or deceptive bytes raise
:class:`WireError`, whose callers say what kind of file it was.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

__all__ = [
    "BYTES",
    "FIXED32",
    "FIXED64",
    "VARINT",
    "Field",
    "WireError",
    "bytes_field",
    "bytes_header",
    "fields",
    "varint",
    "varint_field",
    "varints",
]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_SIZES = {FIXED64: 8, FIXED32: 4}
_ALL_BITS = 0xFFFFFFFFFFFFFFFF


class WireError(Exception):
    """The bytes are no protocol buffer; the message goes behind "the file is damaged:"."""


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        number, wire: its number and wire type.
        value: of a varint, as 64 bits without a sign.
        start, end: of its payload, for the other wire types.
    """

    number: int
    wire: int
    value: int
    start: int
    end: int


def fields(data: bytes, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in ``data[start:end]``, in their order.

    Raises:
        WireError: see the module.
    """
    at = start
    while at < end:
        tag, at = varint(data, at, end)
        wire = tag & 7
        value, size = 0, 0
        if wire == BYTES:
            size, at = varint(data, at, end)
        elif wire == VARINT:
            value, at = varint(data, at, end)
        elif wire in _SIZES:
            size = _SIZES[wire]
        else:
            raise WireError(f"it has a field of wire type {wire}")
        if tag < 8 or size > end - at:
            raise WireError("a field reaches past its message")
        yield Field(tag >> 3, wire, value, at, at + size)
        at += size


def varints(data: bytes, field: Field) -> list[int]:
    """The numbers of a repeated field, whether packed or one of its single entries.

    Raises:
        WireError: see the module.
    """
    if field.wire == VARINT:
        return [field.value]
    values, at = [], field.start
    while field.wire == BYTES and at < field.end:
        value, at = varint(data, at, field.end)
        values.append(value)
    return values


def varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The number at ``at``, as 64 bits without a sign, and where the next byte is.

    Raises:
        WireError: it does not end before ``end`` or within ten bytes.
    """
    if at < end and data[at] < 0x80:
        return data[at], at + 1
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _ALL_BITS, at
    raise WireError("it ends in the middle of a number")


def varint_field(number: int, value: int) -> bytes:
    """A field that holds ``value``, an integer of 64 bits with or without a sign."""
    return _number(number << 3 | VARINT) + _number(value & _ALL_BITS)


def bytes_header(number: int, size: int) -> bytes:
    """What stands before the ``size`` bytes of a field: text, bytes, or a message."""
    return _number(number << 3 | BYTES) + _number(size)


def bytes_field(number: int, payload: bytes) -> bytes:
    """A field that holds ``payload``."""
    return bytes_header(number, len(payload)) + payload


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
