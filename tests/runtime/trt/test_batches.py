"""Cutting batches into those an engine takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.errors import BackendError
from moon.runtime.trt.batches import Profile


def test_large_batches_are_cut_as_large_as_can_be() -> None:
    assert Profile(1, 4, 4).pieces(10) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert Profile(1, 1, 1).pieces(3) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert Profile(2, 4, 8).pieces(8) == [slice(0, 8)]


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 100))
def test_pieces_cover_every_row_once(least: int, more: int, rows: int) -> None:
    profile = Profile(least, least, least + more)
    covered = [i for piece in profile.pieces(rows) for i in range(piece.start, piece.stop)]
    assert covered == list(range(rows))
    for piece in profile.pieces(rows):
        assert least <= profile.padded(piece.stop - piece.start) <= profile.most


def test_too_few_rows_are_filled_up_with_the_last() -> None:
    target = np.zeros((4, 2), np.float32)
    rows = np.float32([[1, 2], [3, 4]])
    assert Profile(3, 3, 4).fill(target, rows) == 3
    assert target.tolist() == [[1, 2], [3, 4], [3, 4], [0, 0]]


def test_a_profile_that_is_no_range() -> None:
    with pytest.raises(BackendError, match="for 4, 2 and 8 rows, which is no range"):
        Profile(4, 2, 8)
