"""Images to time a model with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import UsageError

if TYPE_CHECKING:
    from moon.runtime.sparse.engine import SparseEngine

__all__ = ["sample"]


def sample(engine: SparseEngine, batch: int) -> dict[str, NDArray[Any]]:
    """Random images for an engine.

    Raises:
        UsageError: the model takes no images alone, or another number of them.
    """
    if batch < 1 or len(engine.inputs) != 1:
        raise UsageError(f"{batch} images for a model with {len(engine.inputs)} inputs")
    (one,) = engine.inputs
    if one.shape is None or one.dtype is None or not all(one.shape[1:]):
        raise UsageError(f"the sizes of the input {one.name} are not fixed: {one}")
    rng, shape = np.random.default_rng(0), (batch, *(size or 1 for size in one.shape[1:]))
    if one.dtype.kind in "ui":
        x = rng.integers(0, 127, shape).astype(one.dtype)
    else:
        x = rng.normal(size=shape).astype(one.dtype)
    one.check(x)
    return {one.name: x}
