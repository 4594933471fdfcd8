"""The drift test's figures, read afresh whenever Prometheus asks."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from moon.serve.ledger import Ledger

__all__ = ["DriftCollector"]


class DriftCollector(Collector):
    """Figures that are of the service and not of one worker.

    Args:
        ledger: the drift test; None where there is no calibrated gate to test.
        facts: of the model.
    """

    def __init__(self, ledger: Ledger | None, facts: dict[str, str]) -> None:
        self.ledger = ledger
        self.facts = facts

    def collect(self) -> Iterator[Metric]:
        """The families, for a registry."""
        if self.facts:
            info = GaugeMetricFamily("moon_model_info", "What is served.", labels=list(self.facts))
            info.add_metric(list(self.facts.values()), 1)
            yield info
        if self.ledger is None:
            return
        watched, bounds = self.ledger.read(), self.ledger.test.bounds
        yield GaugeMetricFamily(
            "moon_drift_e_value",
            "Evidence since the start that more is rejected than the calibration allows; "
            "reaches c without drift with a chance of 1 / c at most, ever.",
            value=watched.e_value,
        )
        yield GaugeMetricFamily(
            "moon_drift_detector",
            "Shiryaev-Roberts e-detector of the same, for a change of late; reaches c without "
            "drift after c images or more on average.",
            value=watched.detector,
        )
        yield GaugeMetricFamily(
            "moon_drift_images", "Images the drift test has seen.", value=watched.images
        )
        yield GaugeMetricFamily(
            "moon_drift_rejected", "Images of those that were rejected.", value=watched.rejected
        )
        yield GaugeMetricFamily(
            "moon_drift_bound",
            "Largest reject rate that the calibration allows: of any threshold, if several.",
            value=max(bounds.values()),
        )
