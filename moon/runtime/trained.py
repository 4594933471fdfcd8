"""Refusing to choose a score or to calibrate by images that the model, or the score, has seen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moon.binomial import lower_tail
from moon.bundle import Bundle
from moon.errors import CalibrationError

if TYPE_CHECKING:
    from moon.data.fingerprint import Overlap, TrainingSketch

__all__ = ["Warn", "fitted_scores", "refuse_fitted", "refuse_trained", "warn_user"]

# More of the images than this being trained on is no chance duplicate, and is refused once it
# is this certain.
_DUPLICATES, _DOUBT = 0.01, 0.001

Prints = NDArray[np.uint64]
Warn = Callable[[str], None]


def warn_user(message: str) -> None:
    """A Python warning: what warnings are where no one else takes them."""
    warnings.warn(message, stacklevel=4)


def refuse_trained(
    bundle: Bundle, spec: str, seen: Prints, warn: Warn, part: str = "calibration"
) -> None:
    """Calibration images must not have been trained on: a model scores those higher.

    A set can hold duplicates of single training images without harm, so only more than 1% of
    the images is refused. The bundle knows a sample of its training images; with M of N sampled
    and at most 1% of the images among the N, the matches are at most binomial.

    Args:
        part: what the images are for, calibration or choosing.

    Raises:
        CalibrationError: certainly more than 1% of them were.
    """
    overlap = _overlap(bundle.training, seen)
    if overlap is None:
        return
    said = f"{_count(overlap, f'{part} images of {spec}')} were trained on{_estimate(overlap)}"
    if _certain(overlap):
        what = "promise" if part == "calibration" else "choice"
        raise CalibrationError(
            f"{said}, so no {what} could be made from them",
            remedy="Use held-out images that the model was not trained on",
        )
    harm = "the promise does not hold" if part == "calibration" else "the choice is a worse one"
    warn(f"{said}: if more than a few are, {harm}")


def refuse_fitted(bundle: Bundle, score: str, spec: str, seen: Prints, warn: Warn) -> None:
    """As :func:`refuse_trained`, of images that the gate's score was fitted to.

    What other scores were fitted to does no harm to this one's threshold.
    """
    for one in bundle.fitted:
        overlap = _overlap(one.sketch, seen) if score in one.scores else None
        if overlap is None:
            continue
        said = f"to {_count(overlap, f'calibration images of {spec}')}{_estimate(overlap)}"
        said = f"the score {score} was fitted {said}"
        if _certain(overlap):
            raise CalibrationError(
                f"{said}, so no promise could be made from them",
                remedy="Use other held-out images, or another score",
            )
        warn(f"{said}: if it was to more than a few, the promise does not hold")


def fitted_scores(bundle: Bundle, seen: Prints) -> dict[str, str]:
    """Scores that were certainly fitted to more than a stray few of these images, and to how many.

    Returns:
        By name, such as "fitted to 20 of these 80 images".
    """
    found: dict[str, str] = {}
    for one in bundle.fitted:
        overlap = _overlap(one.sketch, seen)
        if overlap is not None and _certain(overlap):
            said = f"fitted to {_count(overlap, 'images', 'these')}{_estimate(overlap)}"
            found |= dict.fromkeys(one.scores, said)
    return found


def _overlap(known: TrainingSketch | None, seen: Prints) -> Overlap | None:
    """What of the images is in a sketch; None where that is nothing."""
    from moon.data.fingerprint import overlap_with

    found = None if known is None else overlap_with(known, seen)
    return found if found is not None and found.matches else None


def _certain(overlap: Overlap) -> bool:
    stray = math.ceil(_DUPLICATES * overlap.of)
    if overlap.matches > stray:
        return True
    share = overlap.sampled / overlap.images
    return 1 - lower_tail(overlap.matches - 1, stray, share) < _DOUBT


def _count(overlap: Overlap, what: str, which: str = "the") -> str:
    return f"{overlap.matches:,} of {which} {overlap.of:,} {what}"


def _estimate(overlap: Overlap) -> str:
    """How many they are in all, where only a sample is known."""
    if overlap.sampled == overlap.images:
        return ""
    return f", and an estimated {overlap.estimated:,} in all"
