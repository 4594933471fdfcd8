"""evaluate: how well bundles answer known inputs, and how well they catch unknown ones."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import moon
from moon.bundle import Bundle
from moon.data.labels import known_labels
from moon.data.source import Source
from moon.errors import UsageError
from moon.evaluation.caveats import overlap_warnings, set_warnings, turned_round
from moon.evaluation.classes import class_figures
from moon.evaluation.examples import example_figures
from moon.evaluation.findings import findings
from moon.evaluation.measure import (
    GROUPS,
    gate_figures,
    id_figures,
    model_figures,
    plot_figures,
    score_figures,
)
from moon.evaluation.metrics import Ints
from moon.evaluation.observe import Observed, check_scores, observe
from moon.evaluation.overlap import (
    chosen_on,
    overlaps,
    sampled_overlaps,
    training_overlaps,
    training_sample,
)
from moon.evaluation.report import BundleReport, Report, report_folder
from moon.evaluation.robustness import RUNS, corruption_figures, corruption_sample
from moon.evaluation.sets import EvalSet, described, open_sets
from moon.evaluation.store import Store
from moon.gate import Gate
from moon.progress import Progress, silent
from moon.runtime.predictor import Predictor

__all__ = ["BundleLike", "SourceLike", "evaluate"]

BundleLike = Bundle | str | os.PathLike[str]
SourceLike = Source | str | os.PathLike[str]
Sets = tuple[EvalSet, ...]
# A stopped evaluation loses at most this many images of work.
PART = 50_000
Seen = dict[tuple[str, str], Observed]


def evaluate(
    bundle: BundleLike | Sequence[BundleLike],
    *,
    id: SourceLike,  # noqa: A002
    near: Mapping[str, SourceLike] | None = None,
    far: Mapping[str, SourceLike] | None = None,
    scores: Sequence[str] | None = None,
    limit: int | None = None,
    corruptions: int = 250,
    jpeg: int | None = None,
    backend: str = "onnxruntime",
    threads: int = 1,
    batch_size: int = 64,
    resamples: int = 1000,
    benchmark: Mapping[str, Any] | None = None,
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
        scores: names of scores the bundles carry, or msp, ebo, mls, gen, unknown; default those
            each bundle carries.
        limit: at most so many images of each set, drawn at random, always the same ones.
        corruptions: how many of the known images are also shown corrupted, each 25 times;
            0 for none.
        jpeg: show every image of every set re-encoded as a JPEG of this quality at the model's
            size, so that no set can be told from another by how it was compressed.
        backend: what runs the model.
        threads: threads the backend may use.
        batch_size: images at a time; no more than a few batches are ever in memory.
        resamples: bootstrap draws for the intervals of FPR@95; 0 for no intervals.
        benchmark: ``name`` of the benchmark the sets are of, and ``missing``, a line for each
            set of it that is not there; goes into the report.
        out: where to write the report; nothing is written without it. What is observed of
            each set is kept there, and an evaluation that was stopped goes on from it.

    Raises:
        UsageError: no bundle, an unknown score, or a name that is a set twice.
        DataError: a source is unreadable, empty, or holds classes the bundle does not know.
        BundleError: a bundle is damaged.
    """
    if out is not None:
        report_folder(out)  # before the minutes that the rest may take
    if corruptions < 0 or (jpeg is not None and not 1 <= jpeg <= 100):
        raise UsageError("corruptions must be 0 or more, and jpeg a quality from 1 to 100")
    bundles = [Bundle.open(b) if not isinstance(b, Bundle) else b for b in _listed(bundle)]
    sets = open_sets(id, near or {}, far or {}, limit)
    for one in bundles:
        check_scores(scores or (), one)
        known_labels(sets[0].source, sets[0].indices, one.classes)
    worse = corruption_sample(sets[0], corruptions)
    total = len(bundles) * (sum(map(len, sets)) + len(worse) * RUNS)
    run = _Run(
        scores=scores or (),
        backend=backend,
        threads=threads,
        batch_size=batch_size,
        resamples=resamples,
        jpeg=jpeg,
        worse=worse,
        store=Store(None if out is None else Path(out)),
        progress=progress,
        total=total,
    )
    report = Report(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        moon=moon.__version__,
        sets=described(sets),
        bundles=tuple(run.bundle(one, sets) for one in bundles),
        benchmark=None if benchmark is None else dict(benchmark),
        jpeg=jpeg,
    )
    if out is not None:
        report.write(out)
    return report


@dataclasses.dataclass(kw_only=True)
class _Run:
    """The settings of one evaluation, and how many images it has seen."""

    scores: Sequence[str]
    backend: str
    threads: int
    batch_size: int
    resamples: int
    jpeg: int | None
    worse: Ints
    store: Store
    progress: Progress
    total: int
    done: int = 0

    def bundle(self, bundle: Bundle, sets: Sets) -> BundleReport:
        gate = bundle.gate(self.backend)
        names = check_scores(self.scores, bundle)
        names = tuple(dict.fromkeys([*names, *([gate.score] if gate else [])]))
        # Any threshold will do for an uncalibrated bundle: its decisions are not reported.
        predictor = Predictor.open(
            bundle,
            backend=self.backend,
            threads=self.threads,
            threshold=None if gate else 0.0,
            warn=_ignore,
        )
        seen = {one.key: self._observe(predictor, one, names) for one in sets}
        labels = known_labels(sets[0].source, sets[0].indices, bundle.classes)
        corrupted = corruption_figures(
            predictor,
            sets[0],
            labels,
            self.worse,
            gated=gate is not None,
            batch_size=self.batch_size,
            tick=self._tick("corrupting ID"),
            jpeg=self.jpeg,
        )
        return self._report(predictor, sets, seen, labels, corrupted)

    def _report(
        self,
        predictor: Predictor,
        sets: Sets,
        seen: Seen,
        labels: Ints | None,
        corrupted: dict[str, Any] | None,
    ) -> BundleReport:
        bundle = predictor.bundle
        gate = bundle.gate(predictor.backend.name)
        known = seen[sets[0].key]
        groups = {g: {name: s for (of, name), s in seen.items() if of == g} for g in GROUPS}
        found = gate_figures(gate, known, groups, labels)
        measured = {
            name: score_figures(name, known, groups, labels, self.resamples)
            for name in known.scores
        }
        thresholds = {gate.score: gate.threshold} if gate and gate.per_class is None else {}
        plots = plot_figures(known, groups, labels, thresholds)
        if gate is not None:
            plots["examples"] = example_figures(bundle, sets, seen, labels, gate.score, self.jpeg)
        checks = _checks(bundle, gate, sets, seen)
        return BundleReport(
            model=model_figures(bundle),
            backend={"name": self.backend, **predictor.backend.info()},
            id=id_figures(known, labels),
            scores=measured,
            gate=found,
            plots=plots,
            warnings=(
                *set_warnings(bundle, sets, seen, found, labels, self.jpeg),
                *overlap_warnings(checks["overlaps"]),
                *turned_round(measured, found),
            ),
            findings=tuple(findings(found, measured, corrupted, self.jpeg, checks, known)),
            corruptions=corrupted,
            classes=tuple(
                class_figures(bundle.classes, known, groups, labels, gated=gate is not None)
            ),
            checks=checks,
        )

    def _observe(self, predictor: Predictor, one: EvalSet, scores: Sequence[str]) -> Observed:
        """Part by part, each taken from the store where it is there."""
        tick = self._tick(f"evaluating {one.name}")
        key = ""
        if self.store.kept:
            # A provider that fell back to the CPU gives the CPU's scores, not its own.
            fell_back = bool(predictor.backend.info().get("fell_back"))
            backend = predictor.backend.name if fell_back else self.backend
            key = self.store.key(
                predictor.bundle, one.sha256, scores, backend=backend, jpeg=self.jpeg
            )
        parts = []
        for start in range(0, len(one), PART):
            indices = one.indices[start : start + PART]
            name = f"{key}-{start // PART}"
            seen = self.store.load(name, len(indices))
            if seen is not None:
                tick(len(indices))
            else:
                seen = observe(
                    predictor,
                    one.source,
                    scores,
                    indices=indices,
                    batch_size=self.batch_size,
                    tick=tick,
                    jpeg=self.jpeg,
                )
                self.store.save(name, seen)
            parts.append(seen)
        return Observed.joined(parts)

    def _tick(self, what: str) -> Any:
        def tick(count: int) -> None:
            self.done += count
            self.progress(self.done, self.total, what)

        return tick


def _checks(bundle: Bundle, gate: Gate | None, sets: Sets, seen: Seen) -> dict[str, Any]:
    """Images in two sets, how training data was looked at, sets that chose, scores not finite."""
    shared, unchecked = training_overlaps(bundle, sets)
    strange = {one.name: dict(seen[one.key].nonfinite) for one in sets if seen[one.key].nonfinite}
    return {
        "overlaps": [
            *overlaps(sets, seen),
            *shared,
            *sampled_overlaps(bundle, sets, seen, shared),
        ],
        "training_unchecked": unchecked,
        "training_sample": training_sample(bundle),
        "chosen_on": [{"group": group, "set": name} for group, name in chosen_on(gate, sets)],
        "nonfinite": strange,
    }


def _listed(bundle: BundleLike | Sequence[BundleLike]) -> Sequence[BundleLike]:
    if isinstance(bundle, (Bundle, str, os.PathLike)):
        return [bundle]
    if not bundle:
        raise UsageError("there is no bundle to evaluate", remedy="Name one or more")
    return bundle


def _ignore(message: str) -> None:
    """Predictor's warning on an override; here the override decides nothing."""
