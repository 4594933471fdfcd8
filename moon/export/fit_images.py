"""Which images the scores of a graph are fitted to."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moon.data.fingerprint import fingerprints
from moon.data.items import Source
from moon.errors import CalibrationError, UsageError
from moon.scores import SCORE_TABLE

__all__ = ["FIT_LIMIT", "HELD_OUT", "TRAINING", "FitImages", "FittedTo", "part_of"]

TRAINING, HELD_OUT = "training", "held-out"
# Features of so many images fix every constant, and fit in memory: 2,048 of each take 400 MB.
FIT_LIMIT = 50_000
# With fewer training images a class on average, means and percentiles are those of single images.
_EACH = 2
# Held-out images that fix a temperature, one number: a fifth of them, but not too few or many.
_SCALING_SHARE, _SCALING_FEW, _SCALING_MANY = 5, 500, 2000
_SCALING_FEWEST = 10
# Single duplicates are in many sets, and harm no promise.
_DUPLICATES = 0.01

Ints = NDArray[np.int64]


def part_of(name: str) -> str | None:
    """The images a score is fitted to, training or held-out; None where it needs none."""
    if name == "temperature":
        return HELD_OUT
    return TRAINING if {"features", "logits", "labels"} & set(SCORE_TABLE[name].fits) else None


@dataclass(frozen=True)
class FittedTo:
    """Images that scores were fitted to.

    Attributes:
        part: training or held-out.
        source: the images, ``rows`` which of them, ascending.
        scores: names of the scores.
    """

    part: str
    source: Source
    rows: Ints
    scores: tuple[str, ...]


@dataclass(frozen=True)
class FitImages:
    """What scores are fitted to.

    Args:
        training: the images the model was trained on, or None when they are not known.
        held_out: in-distribution images it was not trained on, or None.
        limit: use a random choice of so many training images, always the same.
    """

    training: Source | None
    held_out: Source | None
    limit: int | None = FIT_LIMIT

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"the limit of images to fit to must be 1 or more, not {self.limit}")

    def chosen(self, name: str, part: str, classes: int) -> tuple[Source, Ints]:
        """The images to fit the score ``name`` to, and which of them.

        Raises:
            UsageError: there are none; CalibrationError: too few for ``classes`` known classes.
        """
        return self._training(name, classes) if part == TRAINING else self._held_out(name)

    def _training(self, name: str, classes: int) -> tuple[Source, Ints]:
        source, limit = self.training, self.limit
        if source is None or not len(source):
            raise UsageError(
                f"the score {name} is fitted to the training images, and none are given",
                remedy="Give them with --fit SOURCE",
            )
        chosen = np.arange(len(source))
        if limit is not None and limit < len(source):
            drawn = np.random.default_rng(0).choice(len(source), limit, replace=False)
            chosen = np.sort(drawn)
        fewest = _EACH * classes
        if len(chosen) < fewest:
            more = "Give more with --fit" if len(source) < fewest else "Raise --fit-limit"
            raise CalibrationError(
                f"the score {name} cannot be fitted to {len(chosen):,} of the images of "
                f"{source.spec}: for {classes:,} classes it takes {fewest:,}, {_EACH} each on "
                "average",
                remedy=f"{more}, or leave out the score {name}",
            )
        return source, chosen

    def _held_out(self, name: str) -> tuple[Source, Ints]:
        source = self.held_out
        if source is None:
            raise UsageError(
                f"the score {name} is fitted to held-out images, and none are given",
                remedy="Give them with --data SOURCE",
            )
        chosen = _parts(len(source))[0]
        if len(chosen) < _SCALING_FEWEST:
            raise CalibrationError(
                f"{source.spec} has too few images to fit a temperature to some, at least "
                f"{_SCALING_FEWEST}, and leave others",
                remedy=f"Give more with --data, or leave out the score {name}",
            )
        return source, chosen

    def rest(self, fitted: Container[str]) -> Source | None:
        """The held-out images that no score was fitted to, for the calibration."""
        source = self.held_out
        if source is None or "temperature" not in fitted:
            return source
        return source.select(_parts(len(source))[1])

    def refuse_shared(
        self, fitted_to: FittedTo | None, held_out: Source | None, what: str = "scores"
    ) -> None:
        """Images that a score was fitted to look too familiar to it to calibrate by.

        Args:
            what: was fitted, as the error calls it.

        Raises:
            CalibrationError: more than a stray few of the held-out images are among them.
        """
        if held_out is None or fitted_to is None:
            return
        own = fingerprints(held_out, np.arange(len(held_out)))
        shared = int(np.isin(own, fingerprints(fitted_to.source, fitted_to.rows)).sum())
        if shared > _DUPLICATES * len(own):
            raise CalibrationError(
                f"{what} were fitted to {shared:,} of the {len(own):,} held-out images of "
                f"{held_out.spec}, so no promise could be made from them",
                remedy="Give other images with --data or --fit",
            )


def _parts(count: int) -> tuple[Ints, Ints]:
    """Held-out images for a temperature, and the others; always the same."""
    order = np.random.default_rng(0).permutation(count)
    few = min(_SCALING_FEW, count // 2)
    size = min(_SCALING_MANY, max(count // _SCALING_SHARE, few))
    return np.sort(order[:size]), np.sort(order[size:])
