"""Give a bundle its gate, from held-out in-distribution images as a backend scores them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moon.backend_name import BackendName
from moon.bundle import Bundle
from moon.choice import Choice
from moon.errors import CalibrationError, DataError, UsageError
from moon.gate import Gate
from moon.gate_calibration import Evidence, Rate
from moon.p_table import PTable
from moon.progress import Progress, silent
from moon.rewrite import carries_p_values, gates_lost, with_gate
from moon.runtime.asked import AUTO, Asked
from moon.runtime.backend import DEFAULT, Backend, open_backend
from moon.runtime.choose import ranked
from moon.runtime.ood_sets import Sources, open_ood, refuse_shared
from moon.runtime.scoring import Scored, score_images
from moon.runtime.trained import Warn, fitted_scores, refuse_fitted, refuse_trained, warn_user

if TYPE_CHECKING:
    from moon.data.items import Source

__all__ = ["calibrate"]


def calibrate(
    bundle: Bundle | str | os.PathLike[str],
    source: str | Source,
    *,
    score: str | None = None,
    ood: Sources = (),
    reject: Rate = 0.05,
    method: str = "conformal",
    delta: Rate = 0.05,
    risk: Rate | None = None,
    per_class: bool = False,
    backend: str = DEFAULT,
    limit: int | None = None,
    threads: int = 0,
    progress: Progress = silent,
    warn: Warn = warn_user,
) -> Bundle:
    """Calibrate a bundle in place, and return it reopened.

    With the score ``auto`` a random part of the images, by a fixed seed, only chooses the score:
    a fifth, at least 30 and at most 2,000. The others calibrate, and the promise is as if the
    score had been named. What it rested on is the gate's ``choice``.

    Args:
        bundle: the bundle, or its folder.
        source: held-out in-distribution images, never those it was trained on.
        score: a score the graph carries, or ``auto`` to choose one as
            :mod:`moon.runtime.choose` does; default the one it gates by now.
        ood: sources of out-of-distribution images to choose by, with ``auto`` only; default
            images made from ``source``. They have no part in the threshold.
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
        warn: called with each warning: gates or p-values of other backends that do not follow,
            single images that were trained on or that the score was fitted to, and p-values of
            scores that were fitted to these images.

    Raises:
        CalibrationError: too few images for the promise, and how many it would take; more than
            a stray few of the images were trained on, or the score fitted to them; or no choice is
            possible.
        UsageError: an argument is out of range or missing.
        BundleError: the bundle is damaged, does not carry the score, or was exported by a
            release without thresholds by class.
        DataError, ImageError: the source cannot be read, holds classes the bundle does not
            know, or has no labels for ``risk``.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    name = opened.gate_score if score is None else score
    asked = Asked.checked(opened, name, reject, method, delta, risk, per_class)
    key = BackendName.parse(backend).key
    _check_choosing(name, ood, key)
    from moon.data.labels import known_labels
    from moon.data.load import data_sha256

    images, rows = _opened(opened, source, limit, method)
    unknowns = open_ood(ood)
    runner = open_backend(opened, backend, threads=threads, warn=warn)
    if runner.name != key:
        raise CalibrationError(
            f"{key} cannot run here, and its scores are not {runner.name}'s",
            remedy=f"Calibrate {key} where it runs",
        )
    choice: Choice | None = None
    seen: dict[str, NDArray[np.uint64]] = {}
    if name == AUTO:
        given = rows
        choosing, rows = asked.parts(given)
        choice, seen = ranked(opened, runner, images, given, choosing, unknowns, progress, warn)
        asked = replace(asked, score=choice.score)
    found = _scored(opened, runner, images, rows, asked.score, progress)
    refuse_shared(images.spec, found.fingerprints, seen)
    refuse_trained(opened, images.spec, found.fingerprints, warn)
    refuse_fitted(opened, asked.score, images.spec, found.fingerprints, warn)
    evidence: Evidence = {
        "backend": key,
        "data_sha256": data_sha256(images, rows),
        "reason": found.quantiles(),
    }
    labels = known_labels(images, rows, opened.classes) if method == "risk" else None
    gate = asked.gate(found, None if labels is None else found.labels == labels, evidence)
    if choice is None:
        choice = _earlier_choice(opened, gate, warn)
    return _written(opened, replace(gate, choice=choice), found, key, warn)


def _opened(
    bundle: Bundle, source: str | Source, limit: int | None, method: str
) -> tuple[Source, NDArray[np.int64]]:
    """The images, and the rows of them to use."""
    from moon.data.labels import known_labels
    from moon.data.source import open_source

    images = open_source(source) if isinstance(source, str) else source
    rows = _chosen(len(images), limit)
    if not len(rows):
        raise CalibrationError(f"{images.spec} holds no images", remedy="Use another source")
    if known_labels(images, rows, bundle.classes) is None and method == "risk":
        raise DataError(
            f"{images.spec} has no labels, which the method risk needs",
            remedy="Use a folder with one folder a class, or the method conformal or pac",
        )
    return images, rows


def _earlier_choice(bundle: Bundle, gate: Gate, warn: Warn) -> Choice | None:
    """How the score was once chosen still stands, if it is the same."""
    default = bundle.gate()
    if default is None or default.choice is None or default.score != gate.score:
        return None
    if gate.data_sha256 in default.choice.used_sha256:
        warn(
            f"the score {gate.score} was chosen by some of these very images, which voids the "
            "promise: use others, or --score auto again"
        )
    return default.choice


def _check_choosing(score: str, ood: Sources, backend: str) -> None:
    if ood and score != AUTO:
        raise UsageError(
            "out-of-distribution images are only for choosing a score: they never set a threshold",
            remedy="Add --score auto, or leave --ood out",
        )
    if score == AUTO and backend != DEFAULT:
        raise UsageError(
            f"a gate for {backend} alone uses the default gate's score, so there is none to choose",
            remedy=f"Run moon calibrate --score auto without --backend, then --backend {backend}",
        )


def _scored(
    bundle: Bundle,
    runner: Backend,
    images: Source,
    rows: NDArray[np.int64],
    score: str,
    progress: Progress,
) -> Scored:
    """All carried scores where p-values need them, else only the gate's."""
    every = runner.name == DEFAULT and carries_p_values(bundle)
    names = bundle.manifest.scores if every else (score,)
    return score_images(bundle, runner, images, rows, names, progress, "calibrating")


def _written(bundle: Bundle, gate: Gate, found: Scored, backend: str, warn: Warn) -> Bundle:
    """The bundle with its new gate; says what does not follow it."""
    table = None
    if backend != DEFAULT:
        if carries_p_values(bundle):
            warn(f"p-values in the graph stay those of the default gate, not of {backend}'s own")
    elif carries_p_values(bundle):
        names = bundle.manifest.scores
        table = PTable.of([found.scores[name] for name in names], [gate.k] * len(names))
        for name, why in fitted_scores(bundle, found.fingerprints).items():
            warn(f"p-values of the score {name} promise nothing now: it was {why}")
    lost = gates_lost(bundle, gate)
    name = "default" if backend == DEFAULT else backend
    written = with_gate(bundle, gate, name, p_table=table)
    if lost:
        warn(
            f"the gate of {', '.join(lost)} alone was by another score than {gate.score} and is "
            "gone: calibrate again with --backend where it is needed"
        )
    return written


def _chosen(n: int, limit: int | None) -> NDArray[np.int64]:
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be 1 or more, not {limit}")
    if limit is None or limit >= n:
        return np.arange(n)
    # Sources are often sorted by class, so the first images would not stand for all.
    return np.sort(np.random.default_rng(0).permutation(n)[:limit])
