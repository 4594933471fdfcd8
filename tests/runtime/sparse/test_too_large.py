"""Models and batches for which tables or memory do not suffice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moon.errors import BackendError
from moon.runtime import SparseEngine

from .graphs import reference
from .test_opening import wide

pytestmark = pytest.mark.usefixtures("small_pays")

# What goes wrong in preparing kernels -> what is said.
TOO_MUCH = [
    (ValueError("the rows"), "too large for the engine: the rows", "2 images are too many"),
    (MemoryError(), "too little memory for the engine's tables", "not enough memory for so many"),
    (BackendError("there is no room"), "the whole model: there is no room", "there is no room"),
]


@pytest.mark.parametrize(("error", "at_first", "later"), TOO_MUCH, ids=str)
def test_what_is_too_large_for_the_kernels(
    error: Exception, at_first: str, later: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise error

    data, x = wide().data(), wide().images(2)
    ready = SparseEngine(data)
    one = ready.run(x[:1])
    monkeypatch.setattr("moon.runtime.sparse.machine.Program", refuse)
    engine = SparseEngine(data)
    assert at_first in engine.handed_over and engine.isa == ""
    assert np.array_equal(engine.run(x), reference(data, x)[0])
    with pytest.raises(BackendError, match=later):
        ready.run(x)
    assert np.array_equal(ready.run(x[:1]), one)  # and goes on
