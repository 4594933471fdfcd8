"""Predictor: from images to decisions, the same everywhere a bundle runs."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle
from moon.data.preprocess import ImageLike
from moon.errors import BundleError, ImageError, UsageError
from moon.gate import Decision, Gate, explain
from moon.runtime.agreement import precision_of
from moon.runtime.backend import DEFAULT, Backend, open_backend
from moon.runtime.close import close_calls, decide_alone
from moon.scores import ebo, known_probabilities, unknown_probability
from moon.threshold import accepts, as_float32

__all__ = ["Predictor"]

_TOP = 5


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


class Predictor:
    """A bundle ready to decide. Safe to use from several threads at once.

    Make one with :meth:`open`.

    Attributes:
        bundle: what it runs.
        backend: what computes the graph.
        threshold: what scores are compared with; of a gate by predicted class, which compares
            with its class's, the one over all classes.
    """

    def __init__(self, bundle: Bundle, backend: Backend, threshold: float | None = None) -> None:
        self.bundle, self.backend = bundle, backend
        self._gate: Gate | None = bundle.gate(backend.name)
        self.threshold = _threshold(bundle, self._gate, threshold)
        self._overridden = threshold is not None
        self._by_class = None
        if threshold is None and self._gate is not None:
            self._by_class = self._gate.per_class

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | Bundle,
        *,
        backend: str = DEFAULT,
        threads: int = 1,
        threshold: float | None = None,
        key: str | os.PathLike[str] | None = None,
        warn: Callable[[str], None] = _warn,
    ) -> Predictor:
        """Open a bundle, verified, and load its graph.

        Args:
            path: the bundle or its folder.
            backend: see :data:`moon.runtime.backend.NAMES`.
            threads: threads for one inference; 0 leaves it to the backend.
            threshold: accept by this instead of the calibrated threshold; ``warn`` is told.
            key: see :meth:`moon.bundle.Bundle.open`.
            warn: called with each warning.

        Raises:
            BundleError: the bundle is damaged, or not calibrated and no threshold was given.
            BackendError: the backend cannot run here.
            UsageError: the threshold is not a finite number.
        """
        bundle = path if isinstance(path, Bundle) else Bundle.open(path, key=key)
        bar = _threshold(bundle, bundle.gate(backend), threshold)  # before loading the graph
        if threshold is not None:
            warn(f"the threshold {bar:g} was given, not calibrated: no guarantee holds")
        opened = open_backend(bundle, backend, threads=threads, warn=warn)
        return cls(bundle, opened, threshold)

    @property
    def gate(self) -> Gate | None:
        """The calibrated gate that decides; None where a threshold was given instead."""
        return None if self._overridden else self._gate

    def prepare(self, item: ImageLike) -> NDArray[np.uint8]:
        """The model's input pixels of one image, uint8 [H, W, C].

        Raises:
            ImageError: it cannot be read, or is an array of another shape or type.
        """
        return self.bundle.preprocess.pixels(item)

    def raw(self, pixels_NHWC: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """The graph's outputs by name for prepared pixels, uint8 [N, H, W, C].

        ``accept`` follows this predictor's threshold. It and ``label`` are what each image
        would get alone, whatever the batch; scores may differ by rounding
        (:mod:`moon.runtime.close`).
        """
        manifest = self.bundle.manifest
        as_is = manifest.input.dtype == "uint8"
        batch: NDArray[Any] = (
            np.ascontiguousarray(pixels_NHWC)
            if as_is
            else self.bundle.preprocess.normalise(pixels_NHWC)
        )
        outputs = self._run(batch)
        if len(batch) < 2:
            return outputs
        bars = self._bars(outputs["label"])
        index = manifest.unknown_index
        precision = precision_of(manifest.precision, self.backend.name)
        rows = close_calls(outputs, bars, unknown_index=index, precision=precision)
        return decide_alone(outputs, rows, lambda row: self._run(batch[row : row + 1]))

    def _run(self, batch: NDArray[Any]) -> dict[str, NDArray[Any]]:
        if self._by_class is None:
            return self.backend.run(batch, self.threshold)
        outputs = self.backend.run(batch)
        if self._gate is not self.bundle.gate():
            # The graph holds the default gate's thresholds, not this backend's own.
            outputs["accept"] = accepts(outputs["score"], self._bars(outputs["label"]))
        return outputs

    @property
    def largest_batch(self) -> int | None:
        """Most images the backend takes at once; None for any number."""
        most = self.backend.info().get("largest_batch")
        return None if most is None else int(most)

    def _bars(self, labels_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """What each score is compared with, [N]."""
        if self._by_class is not None:
            return self._by_class.thresholds(labels_N)
        return np.full(len(labels_N), self.threshold, dtype=np.float32)

    def decide(
        self, pixels_NHWC: NDArray[np.uint8], inputs: Iterable[str | int | None] | None = None
    ) -> list[Decision]:
        """A decision for each of the prepared images, uint8 [N, H, W, C].

        Args:
            pixels_NHWC: from :meth:`prepare`, stacked.
            inputs: what to call each of them in its decision; default None.
        """
        if not len(pixels_NHWC):
            return []
        outputs = self.raw(pixels_NHWC)
        names = [None] * len(pixels_NHWC) if inputs is None else list(inputs)
        return self.decisions(outputs, names)

    def predict(self, items: Iterable[ImageLike], *, batch_size: int = 64) -> list[Decision]:
        """A decision for each image; the first that cannot be read stops it.

        Args:
            items: paths, bytes of image files, Pillow images, or uint8 arrays of the
                model's own shape. A decision's ``input`` is the path, or else the index.
            batch_size: images run at once.

        Raises:
            ImageError: an image cannot be read.
        """
        decisions = []
        for result in self._stream(items, batch_size):
            if isinstance(result, ImageError):
                raise result
            decisions.append(result)
        return decisions

    def predict_each(
        self, items: Iterable[ImageLike], *, batch_size: int = 64
    ) -> list[Decision | ImageError]:
        """Like :meth:`predict`, with an error in the place of each image that cannot be read."""
        return list(self._stream(items, batch_size))

    def _stream(
        self, items: Iterable[ImageLike], batch_size: int
    ) -> Iterator[Decision | ImageError]:
        if batch_size < 1:
            raise UsageError(f"batch_size must be 1 or more, not {batch_size}")
        waiting: list[tuple[str | int, NDArray[np.uint8] | ImageError]] = []
        for index, item in enumerate(items):
            name = str(item) if isinstance(item, (str, Path, os.PathLike)) else index
            try:
                waiting.append((name, self.prepare(item)))
            except ImageError as error:
                waiting.append((name, error))
            if len(waiting) == batch_size:
                yield from self._settle(waiting)
                waiting = []
        yield from self._settle(waiting)

    def _settle(
        self, waiting: list[tuple[str | int, NDArray[np.uint8] | ImageError]]
    ) -> Iterator[Decision | ImageError]:
        good = [(name, got) for name, got in waiting if not isinstance(got, ImageError)]
        stacked = np.stack([got for _, got in good]) if good else np.empty((0,), np.uint8)
        decisions = iter(self.decide(stacked, [name for name, _ in good]))
        for _, got in waiting:
            yield got if isinstance(got, ImageError) else next(decisions)

    def decisions(
        self, outputs: dict[str, NDArray[Any]], names: Sequence[str | int | None]
    ) -> list[Decision]:
        """The decisions that outputs of :meth:`raw` mean, ``names`` being their inputs."""
        unknown_index = self.bundle.manifest.unknown_index
        logits_NL = outputs["logits"]
        known_NK = known_probabilities(logits_NL, unknown_index)
        energy_N = ebo(logits_NL, unknown_index)
        unknown_N = None if unknown_index is None else unknown_probability(logits_NL, unknown_index)
        scores_N = as_float32(outputs["score"])
        # As Gate.accepts, by this predictor's threshold.
        bars_N = self._bars(outputs["label"])
        accepted_N = accepts(scores_N, bars_N)
        return [
            self._decision(
                name,
                accepted=bool(accepted_N[i]),
                label=int(outputs["label"][i]),
                score=float(scores_N[i]),
                bar=float(bars_N[i]),
                known_K=known_NK[i],
                p_unknown=None if unknown_N is None else float(unknown_N[i]),
                energy=float(energy_N[i]),
            )
            for i, name in enumerate(names)
        ]

    def _decision(
        self,
        name: str | int | None,
        *,
        accepted: bool,
        label: int,
        score: float,
        bar: float,
        known_K: NDArray[np.float64],
        p_unknown: float | None,
        energy: float,
    ) -> Decision:
        reason = None
        if not accepted:
            quantiles = self._gate.reason if self._gate is not None else {}
            reason = explain(quantiles, p_unknown=p_unknown, msp=float(known_K.max()), ebo=energy)
        return Decision(
            accepted=accepted,
            label=self.bundle.classes[label] if accepted else None,
            reason=reason,
            top=self._top(known_K),
            score_name=self.bundle.gate_score,
            score=score if math.isfinite(score) else None,
            threshold=bar,
            p_value=self._gate.p_value(score, label) if self._gate is not None else None,
            input=name,
        )

    def _top(self, known_K: NDArray[np.float64]) -> tuple[tuple[str, float], ...]:
        if not np.isfinite(known_K).all():
            return ()
        best = np.argsort(-known_K, kind="stable")[:_TOP]
        return tuple((self.bundle.classes[i], float(known_K[i])) for i in best)


def _threshold(bundle: Bundle, gate: Gate | None, given: float | None) -> float:
    if given is not None:
        value = float(as_float32(given))
        if not math.isfinite(value):
            raise UsageError(f"the threshold must be a finite number, not {given}")
        return value
    if gate is None:
        raise BundleError(
            f"{bundle.path} is not calibrated, so it has no threshold to accept by",
            remedy=f"Run moon calibrate {bundle.path} --data SOURCE, or pass --threshold X",
        )
    return gate.threshold
