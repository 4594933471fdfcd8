"""evaluate: how well bundles answer known inputs, and how well they catch unknown ones."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import moon
from moon.bundle import Bundle
from moon.data.labels import known_labels
from moon.data.source import Source, open_source
from moon.errors import DataError, UsageError
from moon.evaluation.measure import (
    GROUPS,
    gate_figures,
    id_figures,
    model_figures,
    plot_figures,
    score_figures,
)
from moon.evaluation.metrics import Ints
from moon.evaluation.observe import Observed, check_scores, observe, sample
from moon.evaluation.report import BundleReport, Report, report_folder
from moon.gate import Gate
from moon.progress import Progress, silent
from moon.runtime.predictor import Predictor

__all__ = ["BundleLike", "SourceLike", "evaluate"]

BundleLike = Bundle | str | os.PathLike[str]
SourceLike = Source | str | os.PathLike[str]
Sets = dict[str, dict[str, tuple[Source, Ints]]]


def evaluate(
    bundle: BundleLike | Sequence[BundleLike],
    *,
    id: SourceLike,  # noqa: A002
    near: Mapping[str, SourceLike] | None = None,
    far: Mapping[str, SourceLike] | None = None,
    scores: Sequence[str] | None = None,
    limit: int | None = None,
    backend: str = "onnxruntime",
    threads: int = 1,
    batch_size: int = 64,
    resamples: int = 200,
    out: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> Report:
    """Measure one bundle, or several side by side, on the same images.

    Args:
        bundle: one, or a sequence to compare. One that is not calibrated is measured
            without a gate.
        id: in-distribution test images; accuracy and ECE need labels.
        near: near-OOD sets by name; any labels are ignored.
        far: far-OOD sets by name.
        scores: names from ``moon.scores.SCORES``; default those each bundle carries.
        limit: at most so many images of each set, drawn at random, always the same ones.
        backend: what runs the model.
        threads: threads the backend may use.
        batch_size: images at a time; no more than a few batches are ever in memory.
        resamples: bootstrap draws for the intervals of AUROC; 0 for none.
        out: where to write report.json and report.html; nothing is written without it.

    Raises:
        UsageError: no bundle, an unknown score, or a name that is a set twice.
        DataError: a source is unreadable, empty, or holds classes the bundle does not know.
        BundleError: a bundle is damaged.
    """
    if out is not None:
        report_folder(out)  # before the minutes that the rest may take
    bundles = [Bundle.open(b) if not isinstance(b, Bundle) else b for b in _listed(bundle)]
    sets = _open_sets(id, near or {}, far or {}, limit)
    for one in bundles:
        check_scores(scores or one.manifest.scores, one.manifest.unknown_index)
        known_labels(*_only(sets["id"]), one.classes)
    total = len(bundles) * sum(len(i) for group in sets.values() for _, i in group.values())
    run = _Run(scores, backend, threads, batch_size, resamples, progress, total)
    report = Report(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        moon=moon.__version__,
        sets=_described(sets),
        bundles=tuple(run.bundle(one, sets) for one in bundles),
    )
    if out is not None:
        report.write(out)
    return report


@dataclasses.dataclass
class _Run:
    """The settings of one evaluation, and how many images it has seen."""

    scores: Sequence[str] | None
    backend: str
    threads: int
    batch_size: int
    resamples: int
    progress: Progress
    total: int
    done: int = 0

    def bundle(self, bundle: Bundle, sets: Sets) -> BundleReport:
        names = check_scores(self.scores or bundle.manifest.scores, bundle.manifest.unknown_index)
        gate = bundle.gate(self.backend)
        with_gate = tuple(dict.fromkeys([*names, *([gate.score] if gate else [])]))
        # Any threshold will do for an uncalibrated bundle: its decisions are not reported.
        predictor = Predictor.open(
            bundle,
            backend=self.backend,
            threads=self.threads,
            threshold=None if gate else 0.0,
            warn=_ignore,
        )
        seen = {
            group: {
                name: self._observe(predictor, name, source, indices, with_gate)
                for name, (source, indices) in members.items()
            }
            for group, members in sets.items()
        }
        (known,) = seen["id"].values()
        groups = {group: seen[group] for group in GROUPS}
        labels = known_labels(*_only(sets["id"]), bundle.classes)
        thresholds = {gate.score: gate.threshold} if gate else {}
        found = gate_figures(gate, known, groups, labels)
        measured = {n: score_figures(n, known, groups, labels, self.resamples) for n in with_gate}
        said = _warnings(bundle, sets, seen, found, labels)
        return BundleReport(
            model=model_figures(bundle),
            backend={"name": self.backend, **predictor.backend.info()},
            id=id_figures(known, labels),
            scores=measured,
            gate=found,
            plots=plot_figures(known, groups, labels, thresholds),
            warnings=(*said, *_turned_round(measured, gate)),
        )

    def _observe(
        self,
        predictor: Predictor,
        name: str,
        source: Source,
        indices: Ints,
        scores: Sequence[str],
    ) -> Observed:
        def tick(count: int) -> None:
            self.done += count
            self.progress(self.done, self.total, f"evaluating {name}")

        return observe(
            predictor, source, scores, indices=indices, batch_size=self.batch_size, tick=tick
        )


def _listed(bundle: BundleLike | Sequence[BundleLike]) -> Sequence[BundleLike]:
    if isinstance(bundle, (Bundle, str, os.PathLike)):
        return [bundle]
    if not bundle:
        raise UsageError("there is no bundle to evaluate", remedy="Name one or more")
    return bundle


def _open_sets(
    known: SourceLike,
    near: Mapping[str, SourceLike],
    far: Mapping[str, SourceLike],
    limit: int | None,
) -> Sets:
    both = sorted(set(near) & set(far))
    if both:
        raise UsageError(
            f"{both[0]} is both a near and a far set", remedy="Give each set its own name"
        )
    sets: Sets = {"id": {}, "near": {}, "far": {}}
    for group, members in (("id", {"ID": known}), ("near", near), ("far", far)):
        for name, given in members.items():
            source = given if isinstance(given, Source) else open_source(given)
            if len(source) == 0:
                raise DataError(f"{source.spec} holds no images")
            sets[group][name] = (source, sample(source, limit))
    return sets


def _only(members: dict[str, tuple[Source, Ints]]) -> tuple[Source, Ints]:
    ((source, indices),) = members.values()
    return source, indices


def _described(sets: Sets) -> dict[str, Any]:
    return {
        group: {
            name: {"source": source.spec, "n": len(indices), "of": len(source)}
            for name, (source, indices) in members.items()
        }
        for group, members in sets.items()
    }


def _warnings(
    bundle: Bundle,
    sets: Sets,
    seen: Mapping[str, Mapping[str, Observed]],
    gate: dict[str, Any] | None,
    labels: Ints | None,
) -> list[str]:
    said = []
    if gate is None:
        said.append("The bundle is not calibrated: run moon calibrate to give it a threshold.")
    elif gate["id"]["n"] and _rejects_more(gate):
        rejected = 1 - gate["id"]["accept"]
        said.append(
            f"It rejects {rejected:.1%} of these known inputs, more than its calibration makes "
            "likely: they may not be like the images it was calibrated on."
        )
    if labels is None:
        said.append("The known inputs have no labels, so accuracy and ECE are not known.")
    for group, members in seen.items():
        for name, observed in members.items():
            count = max(observed.nonfinite.values(), default=0)
            if count:
                said.append(
                    f"{name}: {count} of {len(observed)} images have a score that is not "
                    "finite; the gate rejects them, and they rank lowest here."
                )
            shared = _shared_classes(sets[group][name], bundle) if group != "id" else 0
            if shared:
                said.append(
                    f"{name}: {shared} of {len(observed)} images are of classes that bear the "
                    "name of a known class; they may not be unknown inputs at all."
                )
    return said


def _turned_round(scores: Mapping[str, Any], gate: Gate | None) -> Iterator[str]:
    """Sets that the gate's score takes for more known than the known images themselves."""
    if gate is None:
        return
    for group in GROUPS:
        for name, figures in (scores[gate.score][group] or {"sets": {}})["sets"].items():
            if figures["auroc"] < 0.5:
                yield (
                    f"{name}: the gate's score, {gate.score}, ranks it above the known images "
                    f"(AUROC {figures['auroc']:.1%}), so no threshold on it can help there."
                )


def _rejects_more(gate: dict[str, Any]) -> bool:
    """Whether the measured reject rate is beyond both intervals: sampling and calibration."""
    lowest_rejected = 1 - gate["id"]["accept_ci95"][1]
    return bool(lowest_rejected > gate["achieved"]["ci95"][1])


def _shared_classes(member: tuple[Source, Ints], bundle: Bundle) -> int:
    source, indices = member
    if source.labels is None or source.class_names is None:
        return 0
    shared = [i for i, name in enumerate(source.class_names) if name in bundle.classes]
    return int(np.isin(source.labels[indices], shared).sum())


def _ignore(message: str) -> None:
    """Predictor's warning on an override; here the override decides nothing."""
