"""The constants of the scores a graph is to carry, fitted to the model's own training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnx import ModelProto

from moon.data.items import Source
from moon.data.preprocess import Preprocess
from moon.errors import DataError, MoonError, UsageError
from moon.export.fit_images import TRAINING, FitImages, FittedTo
from moon.export.fit_runner import FitRunner
from moon.export.fit_settings import asked_scores, check_settings
from moon.progress import Progress, silent
from moon.scores import FittedScore

__all__ = ["FitImages", "Fitting", "fit_scores"]


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """Scores with their constants.

    Attributes:
        scores: in the order the graph carries them.
        record: by name, what a score was fitted to and how; JSON.
        left_out: by name, why a score that was asked for by "all" is not there.
        fitted_to: the images they were fitted to.
        images: what there was to fit to.
    """

    scores: tuple[FittedScore, ...] = ()
    record: Mapping[str, Any]
    left_out: Mapping[str, str]
    fitted_to: tuple[FittedTo, ...]
    images: FitImages

    @property
    def held_out(self) -> Source | None:
        """The held-out images that no score was fitted to, for the calibration."""
        return self.images.rest(self.record)

    def also(self, fitted_to: FittedTo) -> Fitting:
        """The same, the network itself being fitted to some images too."""
        return replace(self, fitted_to=(*self.fitted_to, fitted_to))

    def without(self, name: str, why: str) -> Fitting:
        """The others, the score ``name`` left out."""
        fitted_to = [
            replace(one, scores=tuple(other for other in one.scores if other != name))
            for one in self.fitted_to
        ]
        return Fitting(
            scores=tuple(one for one in self.scores if one.name != name),
            record={key: facts for key, facts in self.record.items() if key != name},
            left_out={**self.left_out, name: why},
            fitted_to=tuple(one for one in fitted_to if one.scores),
            images=self.images,
        )


def fit_scores(
    body: ModelProto,
    images: FitImages,
    *,
    score: str,
    carry: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]],
    classes: Sequence[str],
    preprocess: Preprocess,
    unknown_index: int | None,
    progress: Progress = silent,
) -> Fitting:
    """Fit every score that was asked for.

    Args:
        body: ``input`` float32 [N, C, H, W] -> ``logits`` [N, L], weights as they will be stored.
        score: the gate's score.
        carry: names of further scores; with "all" in it, those that cannot be had are left out.
        settings: by score, keywords of its fit.
        classes: the known classes, in logit order.

    Raises:
        UsageError: no such score or setting; training images are needed and not given.
        ExportError: a score reads features, and the model does not end in a linear layer.
        CalibrationError: the images are too few or do not fix a constant, or are held-out ones
            too.
        DataError, ImageError: an image cannot be read or is of no known class.
    """
    names = asked_scores(score, carry)
    surely = {score, *carry}
    _check(names, surely, settings, unknown_index)
    runner = FitRunner(body, classes, preprocess, unknown_index, images, progress)
    fitted: list[FittedScore] = []
    record: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            one, facts = runner.fit(name, settings.get(name, {}))
        except MoonError as error:
            if name in surely or isinstance(error, DataError):
                raise
            left_out[name] = error.cause
            continue
        fitted.append(one)
        record[name] = facts
    found = Fitting(
        scores=tuple(fitted),
        record=record,
        left_out=left_out,
        fitted_to=runner.fitted_to(tuple(record)),
        images=images,
    )
    training = next((one for one in found.fitted_to if one.part == TRAINING), None)
    images.refuse_shared(training, found.held_out)
    return found


def _check(
    names: Sequence[str],
    surely: set[str],
    settings: Mapping[str, Mapping[str, Any]],
    unknown_index: int | None,
) -> None:
    """Refuse what cannot be, before any image is read.

    Raises:
        UsageError: see :func:`fit_scores`.
    """
    for name in settings:
        if name not in names:
            raise UsageError(
                f"there are settings for the score {name}, which is not fitted here",
                remedy=f"Carry it, or leave {name} out of the settings",
            )
    if "unknown" in surely and unknown_index is None:
        raise UsageError(
            "the score unknown needs a model with an unknown class",
            remedy="Say which output it is with --unknown-index, or choose another score",
        )
    for name in names:
        check_settings(name, settings.get(name, {}))
