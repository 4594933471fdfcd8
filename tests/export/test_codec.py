from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moon.export.codec import KINDS, Kind, decode, encode

WEIGHTS = hnp.arrays(
    st.sampled_from([np.float32, np.float16]),
    hnp.array_shapes(min_dims=1, max_dims=4, max_side=12),
    # Mostly zeros, so that gaps are long.
    elements=st.one_of(
        st.just(0.0), st.just(0.0), st.just(0.0), st.floats(-10, 10, width=16, allow_nan=False)
    ),
)


def flat(size: int, at: dict[int, float]) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = np.zeros(size, np.float32)
    for i, value in at.items():
        values[i] = value
    return values


@given(WEIGHTS, st.sampled_from(KINDS))
def test_what_is_encoded_comes_back(weight: np.ndarray[Any, Any], kind: Kind) -> None:
    back = decode(encode(weight, kind))
    assert back.dtype == weight.dtype
    assert back.shape == weight.shape
    np.testing.assert_array_equal(back, weight)


@given(st.integers(0, 5000), st.lists(st.integers(1, 1200), max_size=6))
def test_long_gaps_come_back(first: int, distances: list[int]) -> None:
    places = np.cumsum([first, *distances])
    weight = np.zeros(int(places[-1]) + 40_000, np.float32)
    weight[places] = np.arange(1, len(places) + 1)
    encoded = encode(weight, "gaps")
    np.testing.assert_array_equal(decode(encoded), weight)


@pytest.mark.parametrize(
    ("at", "gaps", "values"),
    [
        ({0: 1.0, 3: 2.0}, [0, 3], [1, 2]),
        ({2: 5.0}, [2], [5]),
        ({255: 5.0}, [255], [5]),
        ({256: 5.0}, [255, 1], [0, 5]),
        ({510: 5.0}, [255, 255], [0, 5]),
        ({511: 5.0}, [255, 255, 1], [0, 0, 5]),
        ({1: 3.0, 257: 5.0}, [1, 255, 1], [3, 0, 5]),
        ({}, [0], [0]),
    ],
)
def test_gaps_by_hand(at: dict[int, float], gaps: list[int], values: list[float]) -> None:
    encoded = encode(flat(1000, at), "gaps")
    assert encoded.where.tolist() == gaps
    assert encoded.values.tolist() == values


def test_bitmask_by_hand() -> None:
    weight = np.array([1, 0, 2, 3, 4, 5, 6, 7, 0, 8], np.float32)
    encoded = encode(weight, "bitmask")
    assert encoded.where.tolist() == [0b11111101, 0b10]
    assert encoded.values.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (3, 1, 7), (13, 5, 3, 1), (257,)])
def test_all_zeros_and_none_come_back(shape: tuple[int, ...], kind: Kind) -> None:
    for weight in (np.zeros(shape, np.float32), np.ones(shape, np.float16)):
        back = decode(encode(weight, kind))
        assert back.dtype == weight.dtype and back.shape == shape
        np.testing.assert_array_equal(back, weight)
