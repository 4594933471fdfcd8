"""Which images the ranges of an int8 graph's activations are measured on.

Training images where they are at hand. Else a share of the held-out ones, which the threshold is
then not calibrated on: what fits does not calibrate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.data.items import Source
from moon.data.load import data_sha256, stream
from moon.data.preprocess import Preprocess
from moon.errors import CalibrationError, UsageError
from moon.export.fit_images import HELD_OUT, TRAINING, FitImages, FittedTo

__all__ = ["MOST", "RangeImages"]

# More images move the largest values of a sum of hundreds of terms hardly any further.
MOST = 512
_FEWEST = 32
_SHARE = 5
_BATCH = 32


@dataclass(frozen=True)
class RangeImages:
    """Images that ranges are measured on, and the held-out ones that are left.

    Attributes:
        fitted_to: the images; no scores yet.
        held_out: for the checks and the calibration.
    """

    fitted_to: FittedTo
    held_out: Source

    @classmethod
    def choose(cls, training: Source | None, held_out: Source | None) -> RangeImages:
        """Up to 512 training images, or a fifth of the held-out ones.

        Raises:
            UsageError: no held-out images are given.
            CalibrationError: too few, or the training images are held-out ones too.
        """
        if held_out is None:
            raise UsageError(
                "an int8 graph is checked on held-out images, and none are given",
                remedy="Give them with --data SOURCE, or export with --precision fp32",
            )
        if training is not None and len(training) >= _FEWEST:
            size = min(MOST, len(training))
            rows = np.sort(np.random.default_rng(0).permutation(len(training))[:size])
            fitted_to = FittedTo(TRAINING, training, rows, ())
            what = "the ranges of an int8 graph"
            FitImages(training, held_out).refuse_shared(fitted_to, held_out, what)
            return cls(fitted_to, held_out)
        size = min(MOST, len(held_out) // _SHARE)
        if size < _FEWEST:
            raise CalibrationError(
                f"{held_out.spec} has {len(held_out):,} images, and the ranges of an int8 graph "
                f"take {_FEWEST} of them, at most one in {_SHARE}",
                remedy=f"Give {_FEWEST * _SHARE} or more with --data, or training images with "
                "--fit",
            )
        order = np.random.default_rng(0).permutation(len(held_out))
        rest = held_out.select(np.sort(order[size:]))
        return cls(FittedTo(HELD_OUT, held_out, np.sort(order[:size]), ()), rest)

    def batches(self, preprocess: Preprocess) -> Iterator[NDArray[np.float32]]:
        """The images, float32 [n, C, H, W]."""
        chosen = self.fitted_to
        for _, pixels in stream(chosen.source, preprocess, _BATCH, indices=chosen.rows):
            yield preprocess.normalise(pixels)

    def of_scores(self, names: tuple[str, ...]) -> FittedTo:
        """The images as what these scores, which the graph computes, were fitted to."""
        return replace(self.fitted_to, scores=names)

    def to_json(self) -> dict[str, Any]:
        chosen = self.fitted_to
        return {
            "method": "largest magnitude",
            "part": chosen.part,
            "source": chosen.source.spec,
            "images": len(chosen.rows),
            "data_sha256": data_sha256(chosen.source, chosen.rows),
        }
