"""Images that a graph is tried on, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from moon.data.items import Source
from moon.data.load import load_pixels
from moon.data.preprocess import Preprocess
from moon.errors import ExportError
from moon.export.build import Built, Classifier, Options
from moon.export.checks import check_agreement
from moon.export.session import Session

__all__ = ["GOLDEN", "HALF_IMAGES", "Half", "golden_images", "outputs"]

# Enough to catch a wrong channel order or rounding; small enough to carry along.
GOLDEN = 16
# Rates to a tenth of a percent need a thousand images.
HALF_IMAGES = 1000


def golden_images(source: Source | None, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Images spread evenly over the source, or random pixels."""
    if source is None:
        return _noise(preprocess, GOLDEN)
    count = min(GOLDEN, len(source))
    return load_pixels(source, preprocess, np.arange(count) * len(source) // count)


def _half_images(source: Source | None, preprocess: Preprocess) -> NDArray[np.uint8]:
    if source is None:
        return _noise(preprocess, HALF_IMAGES)
    if len(source) < HALF_IMAGES:
        raise ExportError(
            f"an fp16 graph is checked over at least {HALF_IMAGES:,} images, and {source.spec} "
            f"has {len(source):,}",
            remedy="Give more with --data, or export with --precision fp32",
        )
    return load_pixels(source, preprocess, np.arange(HALF_IMAGES) * len(source) // HALF_IMAGES)


def _noise(preprocess: Preprocess, count: int) -> NDArray[np.uint8]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, *preprocess.shape), dtype=np.uint8)


def outputs(
    model: onnx.ModelProto, options: Options, preprocess: Preprocess, pixels: NDArray[np.uint8]
) -> dict[str, NDArray[Any]]:
    session = Session(model)
    if options.input_dtype == "uint8":
        return session.run_batches("input", pixels)
    # Normalised a batch at a time: the floats of a thousand large images are gigabytes.
    parts = [
        session.run({"input": preprocess.normalise(pixels[i : i + 64])})
        for i in range(0, len(pixels), 64)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class Half:
    """What the fp16 graph, and the fp32 one with the same weights, give for many images."""

    narrow: Mapping[str, NDArray[Any]]
    wide: Mapping[str, NDArray[Any]]

    @classmethod
    def of(
        cls, built: Built, options: Options, source: Source | None, classifier: Classifier
    ) -> Half:
        preprocess = classifier.preprocess
        images = _half_images(source, preprocess)
        narrow = outputs(built.model, options, preprocess, images)
        return cls(narrow, outputs(built.wide, options, preprocess, images))

    def check(self, score: str, threshold: float | None) -> dict[str, Any]:
        return check_agreement(self.wide, self.narrow, score=score, threshold=threshold)
