"""A model's answers to the images that scores are fitted to, and the fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from moon.data.items import Source
from moon.data.labels import known_labels
from moon.data.load import data_sha256, stream
from moon.data.preprocess import Preprocess
from moon.errors import ExportError
from moon.export.classifier import classifier_input, classifier_weights
from moon.export.fit_images import TRAINING, FitImages, FittedTo, part_of
from moon.export.fit_settings import defaults
from moon.export.graph import copied
from moon.export.session import Session
from moon.progress import Progress
from moon.scores import SCORE_TABLE, FittedScore, Training, fit_score

__all__ = ["FitRunner"]

_BATCH = 128


class FitRunner:
    """Runs the model over training and held-out images, each once and only if a score asks.

    Args:
        body: ``input`` float32 [N, C, H, W] -> ``logits`` [N, L], weights as they will be stored.
        classes: the known classes, in logit order.
    """

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
        self._rows: dict[str, tuple[Source, NDArray[np.int64]]] = {}

    def fit(self, name: str, given: Mapping[str, Any]) -> tuple[FittedScore, dict[str, Any]]:
        """The score with its constants, and what it was fitted to and how; JSON.

        Args:
            given: the settings that were asked for.

        Raises:
            MoonError: see :func:`moon.export.fitting.fit_scores`.
        """
        entry = SCORE_TABLE[name]
        if self._features is None and {"features", "head"} & {*entry.fits, *entry.reads}:
            raise ExportError(
                f"the score {name} reads features, and the model does not end in a linear layer",
                remedy=f"Choose one of {', '.join(_of_logits())}",
            )
        facts: dict[str, Any] = {}
        part = part_of(name)
        if part is None:
            training = self._training(logits=np.zeros((1, self._width()), np.float32))
        else:
            training, facts = self._outputs(part, name)
        options = {**defaults(name, training, given), **given}
        return fit_score(name, training, **options), {"options": options, **facts}

    def fitted_to(self, names: Sequence[str]) -> tuple[FittedTo, ...]:
        """The images that the scores ``names`` were fitted to."""
        found = []
        for part, (source, rows) in self._rows.items():
            scores = tuple(name for name in names if part_of(name) == part)
            found += [FittedTo(part, source, rows, scores)] if scores else []
        return tuple(found)

    def _outputs(self, part: str, name: str) -> tuple[Training, dict[str, Any]]:
        if part not in self._seen:
            source, rows = self._images.chosen(name, part, len(self._classes))
            self._seen[part] = self._run(part, source, rows)
            self._rows[part] = source, rows
        return self._seen[part]

    def _run(
        self, part: str, source: Source, chosen: NDArray[np.int64]
    ) -> tuple[Training, dict[str, Any]]:
        role = "training" if part == TRAINING else "in-distribution"
        labels = known_labels(source, chosen, self._classes, role=role)
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


def _of_logits() -> list[str]:
    features = {"features", "head"}
    return [
        name for name, entry in SCORE_TABLE.items() if not features & {*entry.fits, *entry.reads}
    ]
