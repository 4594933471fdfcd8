"""Give a bundle its gate, from held-out in-distribution images as a backend scores them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle
from moon.class_calibration import calibrate_per_class
from moon.errors import CalibrationError, DataError, UsageError
from moon.gate import METHODS, Gate
from moon.gate_calibration import (
    Evidence,
    Promise,
    Rate,
    calibrate_conformal,
    calibrate_pac,
    rate,
)
from moon.progress import Progress, silent
from moon.rewrite import require_by_class
from moon.risk_calibration import calibrate_risk
from moon.runtime.backend import DEFAULT, open_backend
from moon.scores import ebo, msp, unknown_probability
from moon.threshold import as_float32

if TYPE_CHECKING:
    from moon.data.items import Source

__all__ = ["calibrate"]

_BATCH = 128
# Below this quantile of in-distribution images a value is called low, above the upper one high.
_LOW = 0.05


def calibrate(
    bundle: Bundle | str | os.PathLike[str],
    source: str | Source,
    *,
    score: str | None = None,
    reject: Rate = 0.05,
    method: str = "conformal",
    delta: Rate = 0.05,
    risk: Rate | None = None,
    per_class: bool = False,
    backend: str = DEFAULT,
    limit: int | None = None,
    threads: int = 0,
    progress: Progress = silent,
) -> Bundle:
    """Calibrate a bundle in place, and return it reopened.

    Args:
        bundle: the bundle, or its folder.
        source: held-out in-distribution images, never those it was trained on.
        score: a score the graph carries; default the one it gates by now.
        reject: largest share of in-distribution images rejected (conformal, pac).
        method: conformal, pac or risk: see :mod:`moon.gate_calibration`.
        delta: chance that a pac or risk promise fails over the calibration draw.
        risk: largest error among accepted images (risk); needs labels.
        per_class: a threshold for each predicted class, each with the promise (conformal,
            pac): see :mod:`moon.class_calibration`. Labels are not needed.
        backend: computes the scores. The default one sets the default gate and the graph's
            thresholds; another one gets a gate of its own beside it.
        limit: use a random choice of so many images, always the same.
        threads: for the backend; 0 for as many as there are cores.
        progress: told how many images are done.

    Raises:
        CalibrationError: too few images for the promise, and how many it would take.
        UsageError: an argument is out of range or missing.
        BundleError: the bundle is damaged, does not carry the score, or was exported by a
            release without thresholds by class.
        DataError, ImageError: the source cannot be read, holds classes the bundle does not
            know, or has no labels for ``risk``.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    name = opened.gate_score if score is None else score
    asked = _Asked.checked(opened, name, reject, method, delta, risk, per_class)
    from moon.data.labels import known_labels
    from moon.data.load import data_sha256
    from moon.data.source import open_source

    images = open_source(source) if isinstance(source, str) else source
    chosen = _chosen(len(images), limit)
    labels = known_labels(images, chosen, opened.classes)
    if method == "risk" and labels is None:
        raise DataError(
            f"{images.spec} has no labels, which the method risk needs",
            remedy="Use a folder with one folder a class, or the method conformal or pac",
        )
    found = _run(opened, images, chosen, name, backend, threads, progress)
    evidence: Evidence = {
        "backend": backend,
        "data_sha256": data_sha256(images, chosen),
        "reason": found.quantiles(),
    }
    correct = None if method != "risk" or labels is None else found.labels == labels
    gate = asked.gate(found, correct, evidence)
    return opened.with_gate(gate, "default" if backend == DEFAULT else backend)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What was asked for, checked before any image is read."""

    classes: tuple[str, ...]
    score: str
    method: str
    reject: Rate
    delta: Rate
    risk: Rate | None
    per_class: bool

    @classmethod
    def checked(
        cls,
        bundle: Bundle,
        score: str,
        reject: Rate,
        method: str,
        delta: Rate,
        risk: Rate | None,
        per_class: bool,
    ) -> _Asked:
        carried = bundle.manifest.scores
        if score == "auto":
            raise UsageError(
                "choosing a score by itself is not in this version",
                remedy=f"Choose one of {', '.join(carried)}; moon eval compares them",
            )
        if score not in carried:
            raise UsageError(
                f"the bundle does not carry the score {score}",
                remedy=f"Choose one of {', '.join(carried)}",
            )
        if method not in METHODS:
            raise UsageError(
                f"no method is called {method}", remedy=f"Choose one of {', '.join(METHODS)}"
            )
        if (method == "risk") != (risk is not None):
            raise UsageError(
                "the method risk and the largest error, risk, go together",
                remedy="Give both, such as --method risk --risk 0.02, or neither",
            )
        for name, value in (("reject", reject), ("delta", delta), ("risk", risk)):
            if value is not None:
                rate(value, name)
        if per_class:
            if method == "risk":
                raise UsageError(
                    "the method risk has no thresholds by class",
                    remedy="Use the method conformal or pac, or one threshold for all classes",
                )
            require_by_class(bundle)
        return cls(
            classes=bundle.classes,
            score=score,
            method=method,
            reject=reject,
            delta=delta,
            risk=risk,
            per_class=per_class,
        )

    def gate(self, found: _Scored, correct_N: NDArray[np.bool_] | None, evidence: Evidence) -> Gate:
        scores_N, name = found.scores, self.score
        if self.per_class:
            promise = Promise.of(self.reject, self.delta if self.method == "pac" else None)
            return calibrate_per_class(
                scores_N, found.labels, self.classes, promise, score=name, evidence=evidence
            )
        if self.method == "conformal":
            return calibrate_conformal(scores_N, self.reject, score=name, evidence=evidence)
        if self.method == "pac":
            return calibrate_pac(scores_N, self.reject, self.delta, score=name, evidence=evidence)
        assert self.risk is not None and correct_N is not None
        return calibrate_risk(
            scores_N, correct_N, self.risk, self.delta, score=name, evidence=evidence
        )


@dataclass(frozen=True)
class _Scored:
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    reasons: dict[str, NDArray[np.float64]]

    def quantiles(self) -> dict[str, float]:
        """In-distribution quantiles of what explains an abstention."""
        found = {}
        for name, values in self.reasons.items():
            finite = values[np.isfinite(values)]
            if len(finite):
                share = 1 - _LOW if name == "p_unknown" else _LOW
                found[name] = float(np.quantile(finite, share))
        return found


def _chosen(n: int, limit: int | None) -> NDArray[np.int64]:
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be 1 or more, not {limit}")
    if limit is None or limit >= n:
        return np.arange(n)
    # Sources are often sorted by class, so the first images would not stand for all.
    return np.sort(np.random.default_rng(0).permutation(n)[:limit])


def _run(
    bundle: Bundle,
    images: Source,
    chosen: NDArray[np.int64],
    score: str,
    backend: str,
    threads: int,
    progress: Progress,
) -> _Scored:
    from moon.data.load import stream

    if not len(chosen):
        raise CalibrationError(f"{images.spec} holds no images", remedy="Use another source")
    runner = open_backend(bundle, backend, threads=threads)
    as_is = bundle.manifest.input.dtype == "uint8"
    unknown_index = bundle.manifest.unknown_index
    parts: list[dict[str, NDArray[Any]]] = []
    done = 0
    for _, pixels in stream(images, bundle.preprocess, _BATCH, indices=chosen):
        outputs = runner.run(pixels if as_is else bundle.preprocess.normalise(pixels))
        logits_NL = outputs["logits"]
        part: dict[str, NDArray[Any]] = {
            "score": as_float32(outputs[f"score_{score}"]),
            "label": outputs["label"],
            "msp": msp(logits_NL, unknown_index),
            "ebo": ebo(logits_NL, unknown_index),
        }
        if unknown_index is not None:
            part["p_unknown"] = unknown_probability(logits_NL, unknown_index)
        parts.append(part)
        done += len(pixels)
        progress(done, len(chosen), "calibrating")
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return _Scored(joined.pop("score"), joined.pop("label"), joined)
