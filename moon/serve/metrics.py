"""Metrics: what a service counts, for Prometheus.

With several workers the counts lie in files of the folder PROMETHEUS_MULTIPROC_DIR, and
each worker's /metrics adds them all up. The drift test is one for all of them already.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from moon.drift import DriftTest
from moon.gate import Decision, Gate
from moon.runtime.predictor import Predictor
from moon.serve.drift_metrics import DriftCollector
from moon.serve.ledger import Ledger
from moon.serve.score_metrics import ScoreCollector
from moon.serve.settings import Settings
from moon.serve.trail import Span, current

__all__ = ["CONTENT_TYPE", "FOLDER_VARIABLE", "Figures", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
M = TypeVar("M", Counter, Gauge, Histogram)
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)
# Close at the low end, where the gate decides; even above, where honest traffic is too.
_P_VALUES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_ANY_SCORE = (-100.0, -30.0, -10.0, -3.0, -1.0, -0.3, 0.0, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """What one worker counts of its requests; `figures` makes what counts a model's images."""

    def __init__(self) -> None:
        _forget_dead_workers()
        _know_this_process()
        self._registry = CollectorRegistry()
        self._drift = DriftCollector()
        self._scores = ScoreCollector(
            "moon_score", "Scores of the gate; buckets end at quantiles of its calibration."
        )
        self._registry.register(self._scores)
        self._requests = self._counter("requests", "Requests answered.", "route", "status")
        self._seconds = self._histogram(
            "request_seconds", "Time from a request's headers to its answer.", _SECONDS, "route"
        )
        self._stages = self._histogram(
            "stage_seconds", "Time requests spent in a stage: decode, queue, inference.",
            _SECONDS, "stage",
        )  # fmt: skip
        self.decisions = self._counter(
            "decisions", "Images decided; reason is empty for accepted ones.",
            "model", "decision", "reason",
        )  # fmt: skip
        self.unreadable = self._counter(
            "unreadable_images", "Images that could not be read.", "model"
        )
        self.p_values = self._histogram(
            "p_value", "Conformal p-values; even for traffic like the calibration's.", _P_VALUES,
            "model",
        )  # fmt: skip
        self.batches = self._histogram("batch_size", "Images decided at once.", _BATCH, "model")
        self._reloads = self._counter(
            "reloads", "Bundles found changed: swapped in, or refused.", "model", "result"
        )
        self.in_flight = self._gauge("requests_in_flight", "Requests being answered.").metric
        self._in_stage = self._gauge("requests_in_stage", "Requests in a stage now.", "stage")

    def figures(self, name: str, predictor: Predictor, settings: Settings) -> Figures:
        """What counts the images of a model.

        The drift test is that of its gate, where it is calibrated; buckets of scores stay those
        of the first gate of that name.

        Args:
            name: of the model, as clients know it.
            predictor: decides.
            settings: where the drift test's state is kept.
        """
        gate, manifest = predictor.gate, predictor.bundle.manifest
        facts = {
            "model": name,
            "name": manifest.name,
            "version": manifest.version,
            "score": predictor.bundle.gate_score,
            "backend": settings.backend,
        }
        ledger = None
        if gate is not None:
            state = _state_of(name, settings)
            ledger = Ledger(DriftTest.of(gate), manifest.version, state)
        return Figures(self, name, self._scores.histogram(name, _edges(gate)), ledger, facts)

    def watch(self, figures: Figures) -> None:
        """Show these figures' drift test from now on, instead of the last one of that name."""
        self._drift.show(figures.name, figures.facts, figures.ledger)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count one request; ``route`` must come from a fixed set, never from the client."""
        self._requests[route, str(status)].inc()
        self._seconds[route,].observe(seconds)

    def reloaded(self, name: str, result: str) -> None:
        """Count a bundle that was found changed: ``swapped`` or ``refused``."""
        self._reloads[name, result].inc()

    def moved(self, left: str | None, entered: str | None) -> None:
        """A request went from one stage to another."""
        if left is not None:
            self._in_stage[left,].dec()
        if entered is not None:
            self._in_stage[entered,].inc()

    def spent(self, spans: Sequence[Span]) -> None:
        """Count the time a request spent in its stages."""
        for span in spans:
            self._stages[span.stage,].observe(span.seconds)

    def exposition(self) -> bytes:
        """All workers' metrics in Prometheus's text format."""
        registry = self._registry
        if FOLDER_VARIABLE in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        drift = CollectorRegistry()
        drift.register(self._drift)
        return generate_latest(registry) + generate_latest(drift)

    def _counter(self, name: str, help_text: str, *labels: str) -> _Children[Counter]:
        return _Children(Counter(f"moon_{name}", help_text, labels, registry=self._registry))

    def _histogram(
        self, name: str, help_text: str, buckets: Sequence[float], *labels: str
    ) -> _Children[Histogram]:
        return _Children(
            Histogram(f"moon_{name}", help_text, labels, buckets=buckets, registry=self._registry)
        )

    def _gauge(self, name: str, help_text: str, *labels: str) -> _Children[Gauge]:
        options: dict[str, Any] = {"multiprocess_mode": "livesum"}
        gauge = Gauge(f"moon_{name}", help_text, labels, registry=self._registry, **options)
        return _Children(gauge)


class _Children(dict[tuple[str, ...], M]):
    """A metric's parts by their labels, which it takes a lock and 1 us to find itself."""

    def __init__(self, metric: M) -> None:
        self.metric: M = metric

    def __missing__(self, labels: tuple[str, ...]) -> M:
        part: M = self.metric.labels(*labels)
        self[labels] = part
        return part


class Figures:
    """Counts the images of one version of one model.

    Attributes:
        name: of the model.
        facts: of this version.
        ledger: the drift test of all workers; None without a calibrated gate.
    """

    def __init__(
        self,
        metrics: Metrics,
        name: str,
        scores: Histogram,
        ledger: Ledger | None,
        facts: dict[str, str],
    ) -> None:
        self.name, self.facts, self.ledger = name, facts, ledger
        self._metrics, self._scores = metrics, scores.labels(name)
        self._p_values, self._batches = metrics.p_values[name,], metrics.batches[name,]
        self._unreadable = metrics.unreadable[name,]  # told of before there is one

    def decided(self, decisions: Sequence[Decision], unreadable: int) -> None:
        """Count the images of one request, for the drift test and its trail too."""
        metrics = self._metrics
        for decision in decisions:
            outcome = "accept" if decision.accepted else "abstain"
            metrics.decisions[self.name, outcome, decision.reason or ""].inc()
            if decision.score is not None:
                self._scores.observe(decision.score)
            if decision.p_value is not None:
                self._p_values.observe(decision.p_value)
        if unreadable:
            self._unreadable.inc(unreadable)
        if self.ledger is not None:
            self.ledger.add(decisions)
        current().count(decisions, unreadable)

    def batched(self, images: int) -> None:
        """Count images that were decided at once."""
        self._batches.observe(images)

    def close(self) -> None:
        """Let go of the drift test's file."""
        if self.ledger is not None:
            self.ledger.close()


def _state_of(name: str, settings: Settings) -> str | None:
    """The file of a model's drift test: the first one's as it was named, others' beside it."""
    folder = os.environ.get(FOLDER_VARIABLE)
    path = settings.drift_state or (str(Path(folder, "drift.state")) if folder else None)
    if path is None or name == settings.first:
        return path
    return f"{path}.{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _edges(gate: Gate | None) -> tuple[float, ...]:
    """Where the buckets of scores end: at quantiles and thresholds of the calibration."""
    if gate is None:
        return _ANY_SCORE
    last = len(gate.scores) - 1
    quantiles = {gate.scores[round(share * last)] for share in _SHARES}
    groups = (gate.overall,) if gate.per_class is None else gate.per_class.groups
    # Thresholds of many classes would make as many buckets.
    own = {groups[0].value} if len(groups) == 1 else set()
    return tuple(sorted(quantiles | own))


def _know_this_process() -> None:
    # By itself the library asks for the process's id whenever something is counted, some 25
    # times a request. Workers are spawned, never forked.
    if FOLDER_VARIABLE in os.environ:
        own = os.getpid()
        values.ValueClass = values.MultiProcessValue(lambda: own)  # type: ignore[no-untyped-call]


def _forget_dead_workers() -> None:
    # A killed worker cannot take its gauges back.
    folder = os.environ.get(FOLDER_VARIABLE)
    for path in Path(folder).glob("gauge_live*.db") if folder else ():
        worker = path.stem.rpartition("_")[2]
        if worker.isdecimal() and not _alive(int(worker)):
            mark_process_dead(int(worker), folder)  # type: ignore[no-untyped-call]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
