from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.wire import (
    BYTES,
    VARINT,
    WireError,
    bytes_field,
    bytes_header,
    fields,
    varint,
    varint_field,
    varints,
)


@given(st.integers(1, 2**29 - 1), st.integers(-(2**63), 2**64 - 1))
def test_numbers_there_and_back(number: int, value: int) -> None:
    (found,) = fields(data := varint_field(number, value), 0, len(data))
    assert (found.number, found.wire, found.value) == (number, VARINT, value % 2**64)


@given(st.integers(1, 2**29 - 1), st.binary(max_size=300))
def test_bytes_there_and_back(number: int, payload: bytes) -> None:
    data = bytes_field(number, payload) * 2
    for found in fields(data, 0, len(data)):
        assert (found.number, found.wire) == (number, BYTES)
        assert data[found.start : found.end] == payload
    assert data == (bytes_header(number, len(payload)) + payload) * 2


def test_known_bytes() -> None:
    # The example of the protocol's own description: field 1 holds 150.
    assert varint_field(1, 150) == b"\x08\x96\x01"
    assert bytes_field(2, b"testing") == b"\x12\x07testing"


def test_packed_or_single_numbers() -> None:
    packed = bytes_field(4, b"\x03\x8e\x02\x9e\xa7\x05")
    (found,) = fields(packed, 0, len(packed))
    assert varints(packed, found) == [3, 270, 86942]
    (found,) = fields(b"\x20\x07", 0, 2)
    assert varints(b"\x20\x07", found) == [7]


@pytest.mark.parametrize(
    "data", [b"\x08", b"\x08\x96", b"\x12\x07test", b"\x0d\0\0", b"\x0b", b"\x00\x01", b"\xff" * 11]
)
def test_damage(data: bytes) -> None:
    with pytest.raises(WireError):
        list(fields(data, 0, len(data)))


def test_a_number_does_not_reach_past_its_message() -> None:
    with pytest.raises(WireError):
        varint(b"\x96\x01", 0, 1)
