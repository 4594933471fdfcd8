"""Scores by model: one metric whose buckets differ from model to model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

__all__ = ["ScoreCollector"]


class ScoreCollector(Collector):
    """Histograms of one name, one for each model.

    Args:
        name, help_text: of the metric.
    """

    def __init__(self, name: str, help_text: str) -> None:
        self._name, self._help = name, help_text
        self._histograms: dict[str, Histogram] = {}

    def histogram(self, model: str, buckets: Sequence[float]) -> Histogram:
        """That of a model, with the label ``model``; buckets stay those first asked for."""
        if model not in self._histograms:
            self._histograms[model] = Histogram(
                self._name, self._help, ("model",), buckets=buckets, registry=None
            )
        return self._histograms[model]

    def collect(self) -> Iterator[Metric]:
        """One family, for the registry of a service of one process."""
        family = Metric(self._name, self._help, "histogram")
        for histogram in self._histograms.values():
            for found in histogram.collect():
                family.samples += found.samples
        yield family
