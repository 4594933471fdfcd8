"""The constants of the scores a graph is to carry, fitted to the model's own training images."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from moon.data.fingerprint import fingerprints
from moon.data.items import Source
from moon.data.labels import known_labels
from moon.data.load import data_sha256, stream
from moon.data.preprocess import Preprocess
from moon.errors import CalibrationError, DataError, ExportError, MoonError, UsageError
from moon.export.classifier import classifier_input, classifier_weights
from moon.export.fit_settings import check_settings, defaults
from moon.export.graph import copied
from moon.export.head import CARRIED
from moon.export.session import Session
from moon.progress import Progress, silent
from moon.scores import SCORE_TABLE, FittedScore, Training, fit_score

__all__ = ["FIT_LIMIT", "FitImages", "Fitting", "asked_scores", "fit_scores"]

# Features of so many images fix every constant, and fit in memory: 2,048 of each take 400 MB.
FIT_LIMIT = 50_000
_BATCH = 128
# Held-out images that fix a temperature, one number: a fifth of them, but not too few or many.
_SCALING_SHARE, _SCALING_FEW, _SCALING_MANY = 5, 500, 2000
# Single duplicates are in many sets, and harm no promise.
_DUPLICATES = 0.01
_ALL = "all"


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


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """Scores with their constants.

    Attributes:
        scores: in the order the graph carries them.
        record: by name, what a score was fitted to and how; JSON.
        left_out: by name, why a score that was asked for by "all" is not there.
        held_out: the held-out images that no score was fitted to, for the calibration.
    """

    scores: tuple[FittedScore, ...] = ()
    record: Mapping[str, Any]
    left_out: Mapping[str, str]
    held_out: Source | None


def asked_scores(score: str, carry: Sequence[str]) -> tuple[str, ...]:
    """The scores that need fitting or are not carried anyway, of those asked for, in order.

    Args:
        score: the gate's.
        carry: others; "all" is every score a graph can compute.

    Raises:
        UsageError: a name that is no score, or a gate by "all".
    """
    names = {score, *carry}
    if score == _ALL:
        raise UsageError(
            "a gate compares one score, not all", remedy="Name one, and carry all beside it"
        )
    for name in sorted(names - {_ALL}):
        if name == "odin":
            raise UsageError(
                "the score odin needs a gradient, which no exported graph has",
                remedy="Compute it with moon.evaluation.odin, and gate by another score",
            )
        if name not in SCORE_TABLE:
            raise UsageError(
                f"no score is called {name}", remedy=f"Choose one of {', '.join(SCORE_TABLE)}"
            )
    every = _ALL in carry
    return tuple(
        name
        for name, entry in SCORE_TABLE.items()
        if name not in CARRIED and ((every and entry.in_graph) or name in names)
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
        CalibrationError: the images do not fix a constant, or are held-out ones too.
        DataError, ImageError: an image cannot be read or is of no known class.
    """
    names = asked_scores(score, carry)
    for name in settings:
        if name not in names:
            raise UsageError(
                f"there are settings for the score {name}, which is not fitted here",
                remedy=f"Carry it, or leave {name} out of the settings",
            )
    surely = {score, *carry}
    if "unknown" in surely and unknown_index is None:
        raise UsageError(
            "the score unknown needs a model with an unknown class",
            remedy="Say which output it is with --unknown-index, or choose another score",
        )
    for name in names:
        check_settings(name, settings.get(name, {}))
    runner = _Runner(body, classes, preprocess, unknown_index, images, progress)
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
    held_out = runner.rest(record)
    runner.refuse_shared(held_out)
    return Fitting(scores=tuple(fitted), record=record, left_out=left_out, held_out=held_out)


class _Runner:
    """Runs the model over training and held-out images, each once and only if a score asks."""

    def __init__(
        self,
        body: ModelProto,
        classes: Sequence[str],
        preprocess: Preprocess,
        unknown_index: int | None,
        images: FitImages,
        progress: Progress,
    ) -> None:
        self._body, self._classes = body, classes
        self._preprocess, self._unknown_index = preprocess, unknown_index
        self._images, self._progress = images, progress
        self._features = classifier_input(body)
        self._head = classifier_weights(body)
        self._seen: dict[str, tuple[Training, dict[str, Any]]] = {}
        self._fitted_to: NDArray[np.int64] | None = None

    def fit(self, name: str, given: Mapping[str, Any]) -> tuple[FittedScore, dict[str, Any]]:
        entry = SCORE_TABLE[name]
        if self._features is None and {"features", "head"} & {*entry.fits, *entry.reads}:
            raise ExportError(
                f"the score {name} reads features, and the model does not end in a linear layer",
                remedy=f"Choose one of {', '.join(_of_logits())}",
            )
        facts: dict[str, Any] = {}
        if name == "temperature":
            training, facts = self._outputs("held_out", name)
        elif {"features", "logits", "labels"} & set(entry.fits):
            training, facts = self._outputs("training", name)
        else:
            training = self._training(logits=np.zeros((1, self._width()), np.float32))
        options = {**defaults(name, training, given), **given}
        return fit_score(name, training, **options), {"options": options, **facts}

    def rest(self, fitted: Container[str]) -> Source | None:
        """The held-out images that no score was fitted to, for the calibration."""
        source = self._images.held_out
        if source is None or "temperature" not in fitted:
            return source
        return source.select(_parts(len(source))[1])

    def refuse_shared(self, held_out: Source | None) -> None:
        """Images that a score was fitted to look too familiar to it to calibrate by.

        Raises:
            CalibrationError: more than a stray few of the held-out images are among them.
        """
        training = self._images.training
        if held_out is None or training is None or self._fitted_to is None:
            return
        own = fingerprints(held_out, np.arange(len(held_out)))
        shared = int(np.isin(own, fingerprints(training, self._fitted_to)).sum())
        if shared > _DUPLICATES * len(own):
            raise CalibrationError(
                f"scores were fitted to {shared:,} of the {len(own):,} held-out images of "
                f"{held_out.spec}, so no promise could be made from them",
                remedy="Give other images with --data or --fit",
            )

    def _outputs(self, which: str, name: str) -> tuple[Training, dict[str, Any]]:
        if which not in self._seen:
            self._seen[which] = self._run(*self._source(which, name))
        return self._seen[which]

    def _source(self, which: str, name: str) -> tuple[Source, NDArray[np.int64]]:
        if which == "training":
            source, limit = self._images.training, self._images.limit
            if source is None or not len(source):
                raise UsageError(
                    f"the score {name} is fitted to the training images, and none are given",
                    remedy="Give them with --fit SOURCE",
                )
            chosen = np.arange(len(source))
            if limit is not None and limit < len(source):
                drawn = np.random.default_rng(0).choice(len(source), limit, replace=False)
                chosen = np.sort(drawn)
            self._fitted_to = chosen
            return source, chosen
        source = self._images.held_out
        if source is None:
            raise UsageError(
                f"the score {name} is fitted to held-out images, and none are given",
                remedy="Give them with --data SOURCE",
            )
        chosen = _parts(len(source))[0]
        if not len(chosen):
            raise CalibrationError(
                f"{source.spec} has too few images to fit a temperature to some and leave others",
                remedy=f"Give more with --data, or leave out the score {name}",
            )
        return source, chosen

    def _run(self, source: Source, chosen: NDArray[np.int64]) -> tuple[Training, dict[str, Any]]:
        labels = known_labels(source, chosen, self._classes)
        probe = copied(self._body)
        if self._features is not None:
            value = helper.make_tensor_value_info(self._features, TensorProto.FLOAT, None)
            probe.graph.output.append(value)
        session = Session(probe, threads=0)
        found: dict[str, NDArray[np.float32]] = {}
        done = 0
        for _, pixels in stream(source, self._preprocess, _BATCH, indices=chosen):
            outputs = session.run({"input": self._preprocess.normalise(pixels)})
            here = slice(done, done + len(pixels))
            done = here.stop
            for name, values in outputs.items():
                if name not in found:
                    found[name] = np.empty((len(chosen), *values.shape[1:]), np.float32)
                found[name][here] = values
            self._progress(done, len(chosen), "fitting scores")
        features = None if self._features is None else found[self._features]
        training = self._training(features=features, logits=found["logits"], labels=labels)
        return training, {
            "images": len(chosen),
            "source": source.spec,
            "data_sha256": data_sha256(source, chosen),
        }

    def _width(self) -> int:
        return int(self._body.graph.output[0].type.tensor_type.shape.dim[1].dim_value)

    def _training(self, **outputs: Any) -> Training:
        weight, bias = self._head or (None, None)
        return Training(weight=weight, bias=bias, unknown_index=self._unknown_index, **outputs)


def _parts(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Held-out images for a temperature, and the others; always the same."""
    order = np.random.default_rng(0).permutation(count)
    few = min(_SCALING_FEW, count // 2)
    size = min(_SCALING_MANY, max(count // _SCALING_SHARE, few))
    return np.sort(order[:size]), np.sort(order[size:])


def _of_logits() -> list[str]:
    features = {"features", "head"}
    return [
        name for name, entry in SCORE_TABLE.items() if not features & {*entry.fits, *entry.reads}
    ]
