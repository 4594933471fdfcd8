"""Images that a graph is tried on, and what it answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from moon.data.items import Source
from moon.data.load import load_pixels
from moon.data.preprocess import Preprocess
from moon.export.build import Options
from moon.export.session import Session

__all__ = ["GOLDEN", "golden_images", "outputs"]

# Enough to catch a wrong channel order or rounding; small enough to carry along.
GOLDEN = 16


def golden_images(source: Source | None, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Images spread evenly over the source, or random pixels."""
    if source is None:
        return _noise(preprocess, GOLDEN)
    count = min(GOLDEN, len(source))
    return load_pixels(source, preprocess, np.arange(count) * len(source) // count)


def _noise(preprocess: Preprocess, count: int) -> NDArray[np.uint8]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, *preprocess.shape), dtype=np.uint8)


def outputs(
    model: onnx.ModelProto,
    options: Options,
    preprocess: Preprocess,
    pixels: NDArray[np.uint8],
    *,
    threads: int = 1,
) -> dict[str, NDArray[Any]]:
    """All outputs of a finished graph for prepared pixels, uint8 [n, H, W, C]."""
    session = Session(model, threads=threads)
    if options.input_dtype == "uint8":
        return session.run_batches("input", pixels)
    # Normalised a batch at a time: the floats of a thousand large images are gigabytes.
    parts = [
        session.run({"input": preprocess.normalise(pixels[i : i + 64])})
        for i in range(0, len(pixels), 64)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
