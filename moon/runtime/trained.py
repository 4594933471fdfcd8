"""Refusing to calibrate on images the model was trained on."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moon.binomial import lower_tail
from moon.bundle import Bundle
from moon.errors import CalibrationError

__all__ = ["refuse_trained"]

# More of the images than this being trained on is no chance duplicate, and is refused once it
# is this certain.
_DUPLICATES, _DOUBT = 0.01, 0.001


def refuse_trained(
    bundle: Bundle, spec: str, seen: NDArray[np.uint64], warn: Callable[[str], None]
) -> None:
    """Calibration images must not have been trained on: a model scores those higher.

    A set can hold duplicates of single training images without harm, so only more than 1% of
    the images is refused. The bundle knows a sample of its training images; with M of N sampled
    and at most 1% of the images among the N, the matches are at most binomial.

    Raises:
        CalibrationError: certainly more than 1% of them were.
    """
    from moon.data.fingerprint import overlap_with

    if bundle.training is None:
        return
    overlap = overlap_with(bundle.training, seen)
    if not overlap.matches:
        return
    stray = math.ceil(_DUPLICATES * overlap.of)
    share = overlap.sampled / overlap.images
    chance = 0.0 if overlap.matches > stray else 1 - lower_tail(overlap.matches - 1, stray, share)
    said = f"{overlap.matches:,} of the {overlap.of:,} calibration images of {spec}"
    whole = overlap.sampled == overlap.images
    said += " were trained on" + (
        "" if whole else f", and an estimated {overlap.estimated:,} in all"
    )
    if chance < _DOUBT:
        raise CalibrationError(
            f"{said}, so no promise could be made from them",
            remedy="Use held-out images that the model was not trained on",
        )
    warn(f"{said}: if more than a few are, the promise does not hold")
