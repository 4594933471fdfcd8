"""The drift tests' figures, read afresh whenever Prometheus asks."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from moon.serve.ledger import Ledger

__all__ = ["DriftCollector"]

_FIGURES = {
    "e_value": "Evidence since the start that more is rejected than the calibration allows; "
    "reaches c without drift with a chance of 1 / c at most, ever.",
    "detector": "Shiryaev-Roberts e-detector of the same, for a change of late; reaches c without "
    "drift after c images or more on average.",
    "images": "Images the drift test has seen.",
    "rejected": "Images of those that were rejected.",
    "bound": "Largest reject rate that the calibration allows: of any threshold, if several.",
}


class DriftCollector(Collector):
    """Figures that are of the service and not of one worker, by model."""

    def __init__(self) -> None:
        self._shown: dict[str, tuple[dict[str, str], Ledger | None]] = {}

    def show(self, model: str, facts: dict[str, str], ledger: Ledger | None) -> None:
        """What there is of a model from now on.

        Args:
            model: its name.
            facts: of what answers now.
            ledger: its drift test; None where there is no calibrated gate to test.
        """
        self._shown[model] = (facts, ledger)

    def collect(self) -> Iterator[Metric]:
        """The families, for a registry."""
        shown = list(self._shown.items())
        if shown:
            labels = list(shown[0][1][0])
            info = GaugeMetricFamily("moon_model_info", "What is served.", labels=labels)
            for _, (facts, _) in shown:
                info.add_metric([facts[label] for label in labels], 1)
            yield info
        found = {model: _read(ledger) for model, (_, ledger) in shown if ledger is not None}
        for figure, text in _FIGURES.items() if found else ():
            family = GaugeMetricFamily(f"moon_drift_{figure}", text, labels=["model"])
            for model, values in found.items():
                family.add_metric([model], values[figure])
            yield family


def _read(ledger: Ledger) -> dict[str, float]:
    watched = ledger.read()
    return {
        "e_value": watched.e_value,
        "detector": watched.detector,
        "images": watched.images,
        "rejected": watched.rejected,
        "bound": max(ledger.test.bounds.values()),
    }
