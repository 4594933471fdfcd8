"""Scores of many images, as a backend computes them, and what else calibration keeps of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle
from moon.progress import Progress
from moon.runtime.backend import Backend
from moon.scores import ebo, msp, unknown_probability
from moon.threshold import as_float32

if TYPE_CHECKING:
    from moon.data.items import Source

__all__ = ["Scored", "score_images", "score_pixels"]

_BATCH = 128
# Below this quantile of in-distribution images a value is called low, above the upper one high.
_LOW = 0.05


@dataclass(frozen=True, eq=False)
class Scored:
    """N images as a backend sees them.

    Attributes:
        scores: by name of a carried score, float32 [N].
        labels: predicted known class, int64 [N].
        reasons: p_unknown (where there is one), msp and ebo, float64 [N].
        fingerprints: of the pixels, uint64 [N], to know an image again.
    """

    scores: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int64]
    reasons: dict[str, NDArray[np.float64]]
    fingerprints: NDArray[np.uint64]

    def quantiles(self) -> dict[str, float]:
        """In-distribution quantiles of what explains an abstention."""
        found = {}
        for name, values in self.reasons.items():
            finite = values[np.isfinite(values)]
            if len(finite):
                share = 1 - _LOW if name == "p_unknown" else _LOW
                found[name] = float(np.quantile(finite, share))
        return found


def score_images(
    bundle: Bundle,
    runner: Backend,
    images: Source,
    rows: NDArray[np.int64],
    names: Sequence[str],
    progress: Progress,
    what: str,
) -> Scored:
    """Scores of the images at ``rows`` of a source, decoded batch by batch.

    Args:
        names: carried scores to keep.
        progress: told how many images are done, as ``what``.

    Raises:
        DataError, ImageError: an image cannot be read.
    """
    from moon.data.load import stream

    def batches() -> Iterator[NDArray[np.uint8]]:
        done = 0
        for _, pixels in stream(images, bundle.preprocess, _BATCH, indices=rows):
            yield pixels
            done += len(pixels)
            progress(done, len(rows), what)

    return _scored(bundle, runner, batches(), names)


def score_pixels(
    bundle: Bundle, runner: Backend, pixels_NHWC: NDArray[np.uint8], names: Sequence[str]
) -> Scored:
    """Scores of prepared pixels, uint8 [N, H, W, C], N >= 1."""
    parts = (pixels_NHWC[i : i + _BATCH] for i in range(0, len(pixels_NHWC), _BATCH))
    return _scored(bundle, runner, parts, names)


def _scored(
    bundle: Bundle, runner: Backend, batches: Iterator[NDArray[np.uint8]], names: Sequence[str]
) -> Scored:
    from moon.data.fingerprint import pixel_fingerprint

    as_is = bundle.manifest.input.dtype == "uint8"
    unknown_index = bundle.manifest.unknown_index
    parts: list[dict[str, NDArray[Any]]] = []
    for pixels in batches:
        outputs = runner.run(pixels if as_is else bundle.preprocess.normalise(pixels))
        logits_NL = outputs["logits"]
        part: dict[str, NDArray[Any]] = {
            "label": outputs["label"],
            "seen": np.array([pixel_fingerprint(one) for one in pixels], np.uint64),
            "msp": msp(logits_NL, unknown_index),
            "ebo": ebo(logits_NL, unknown_index),
        }
        if unknown_index is not None:
            part["p_unknown"] = unknown_probability(logits_NL, unknown_index)
        part |= {f"score_{name}": as_float32(outputs[f"score_{name}"]) for name in names}
        parts.append(part)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    scores = {name: joined.pop(f"score_{name}") for name in names}
    labels, seen = joined.pop("label"), joined.pop("seen")
    return Scored(scores=scores, labels=labels, reasons=joined, fingerprints=seen)
