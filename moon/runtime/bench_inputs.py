"""What is fed to a model that is measured: its golden images, prepared beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle

__all__ = ["inputs_of"]

_POOL = 16


def inputs_of(bundle: Bundle, samples: int) -> list[NDArray[Any]]:
    """Batches of so many golden images, as the graph takes them, to be used in turn.

    Real images, for zeros and denormals in activations decide how fast some kernels are.
    """
    pixels = bundle.golden()["pixels"]
    as_is = bundle.manifest.input.dtype == "uint8"
    batches = []
    for i in range(max(1, min(_POOL, len(pixels)))):
        chosen = pixels[(np.arange(samples) + i) % len(pixels)]
        batches.append(chosen if as_is else bundle.preprocess.normalise(chosen))
    return batches
