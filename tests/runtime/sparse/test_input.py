"""What may be fed, and what is said of what may not."""

from __future__ import annotations

import numpy as np
import pytest

from moon.errors import UsageError
from moon.runtime.sparse.input import Input, dtype_of, finite

F32 = np.dtype(np.float32)


@pytest.mark.parametrize("size", [1, 100, 8192, 8193, 100_000])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_seen(size: int, bad: float) -> None:
    x = np.ones(size, np.float32)
    assert finite(x)
    for where in {0, size // 2, size - 1}:
        y = x.copy()
        y[where] = bad
        assert not finite(y)


def test_large_numbers_and_none_are_finite() -> None:
    largest = np.finfo(np.float32).max
    assert finite(np.full((2, 3), largest, np.float32))
    assert finite(np.float32([largest, -largest]))
    assert finite(np.zeros((0, 3), np.float32))
    assert finite(np.full(3, 60_000, np.float16)) and not finite(np.float16([np.inf]))
    assert finite(np.float64([1e300])) and not finite(np.float64([np.nan]))


def test_what_fits_and_what_does_not() -> None:
    one = Input("x", F32, (None, 3, None))
    for shape in ((1, 3, 5), (0, 3, 1)):
        one.check(np.zeros(shape, np.float32))
    wrong = [
        np.zeros((1, 4, 5), np.float32), np.zeros((3, 5), np.float32), np.zeros((), np.float32),
        np.zeros((1, 3, 5)), np.zeros((1, 3, 5, 1), np.float32),
    ]  # fmt: skip
    for x in wrong:
        with pytest.raises(UsageError, match=r"the input x must be float32 \[N, 3, \?\], not "):
            one.check(x)
    with pytest.raises(UsageError, match="the input x holds NaN or infinite values"):
        one.check(np.full((1, 3, 1), np.nan, np.float32))


def test_a_number_of_images() -> None:
    one = Input("x", F32, (2, 3))
    one.check(np.zeros((2, 3), np.float32))
    with pytest.raises(UsageError, match="the model is for 2 images at a time, not 1"):
        one.check(np.zeros((1, 3), np.float32))


def test_nothing_is_known() -> None:
    Input("x", None, None).check(np.array(["a", "b"]))
    assert dtype_of("tensor(string)") is None and dtype_of("tensor(float)") == F32
    assert not Input("x", F32, None).is_image and not Input("x", F32, (None, 3)).is_image
    assert Input("x", np.dtype(np.uint8), (None, 8, 8, 1)).is_image
    assert not Input("x", np.dtype(np.int8), (None, 8, 8, 1)).is_image
