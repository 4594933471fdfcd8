"""The loops that say how fast a core can be."""

from __future__ import annotations

import numpy as np
import pytest

from moon.runtime.sparse.isa import available
from moon.runtime.sparse.limits import Limits


@pytest.mark.parametrize("isa", available())
def test_limits_are_of_the_right_loops(isa: str) -> None:
    limits = Limits(isa)
    assert limits.isa == isa
    for calls in limits._calls.values():
        for sums, call in calls:
            call(limits._start, limits._out.ctypes.data, 100)
            # Each multiply-add adds 1 times 1 to its sum.
            np.testing.assert_array_equal(limits._out, 100.0 * sums)
    before = limits.gmacs()
    limits.measure()
    assert all(limits.gmacs()[kind] >= value > 0.1 for kind, value in before.items())
