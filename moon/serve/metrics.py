"""Metrics: what a service counts, for Prometheus.

With several workers the counts lie in files of the folder PROMETHEUS_MULTIPROC_DIR, and
each worker's /metrics adds them all up.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from moon.gate import Decision

__all__ = ["CONTENT_TYPE", "FOLDER_VARIABLE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Counters of one worker."""

    def __init__(self) -> None:
        _forget_dead_workers()
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "moon_requests",
            "Requests answered.",
            ["route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "moon_request_seconds",
            "Time from a request's headers to its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._decisions = Counter(
            "moon_decisions",
            "Images decided; reason is empty for accepted ones.",
            ["decision", "reason"],
            registry=self._registry,
        )
        self._unreadable = Counter(
            "moon_unreadable_images", "Images that could not be read.", registry=self._registry
        )
        self.in_flight = Gauge(
            "moon_requests_in_flight",
            "Requests being answered.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count one request; ``route`` must come from a fixed set, never from the client."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def decided(self, decisions: Iterable[Decision], unreadable: int) -> None:
        """Count the images of one request."""
        for decision in decisions:
            outcome = "accept" if decision.accepted else "abstain"
            self._decisions.labels(outcome, decision.reason or "").inc()
        self._unreadable.inc(unreadable)

    def exposition(self) -> bytes:
        """All workers' metrics in Prometheus's text format."""
        if FOLDER_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        everyone = CollectorRegistry()
        MultiProcessCollector(everyone)  # type: ignore[no-untyped-call]
        return generate_latest(everyone)


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
