"""Latencies to figures: percentiles, drift, and a ratio with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["block_medians", "drift", "histogram", "ratio", "summary", "unpaired_ratio"]

_RESAMPLES = 2000
_BINS = 40


def summary(latencies_ms: ArrayLike) -> dict[str, Any]:
    """min, mean, p50, p90, p95, p99, max and n of latencies in milliseconds.

    A percentile is the smallest latency that so many percent do not exceed, as MLPerf
    counts it; nothing is interpolated.
    """
    values = np.asarray(latencies_ms, dtype=np.float64)
    percentiles = {
        f"p{p}": float(np.percentile(values, p, method="inverted_cdf")) for p in (50, 90, 95, 99)
    }
    return {
        "min": float(values.min()),
        "mean": float(values.mean()),
        **percentiles,
        "max": float(values.max()),
        "n": len(values),
    }


def histogram(latencies_ms: ArrayLike) -> dict[str, Any]:
    """Counts in 40 bins of equal ratio from the smallest latency to the largest."""
    values = np.asarray(latencies_ms, dtype=np.float64)
    low, high = max(values.min(), 1e-6), max(values.max(), 2e-6)
    edges = np.geomspace(low, high * (1 + 1e-9), _BINS + 1)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return {"edges_ms": edges.tolist(), "counts": counts.tolist()}


def block_medians(blocks_ms: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """The median latency of each block."""
    return np.array([np.median(np.asarray(block)) for block in blocks_ms])


def drift(medians: ArrayLike) -> float:
    """How much slower the second half of the blocks ran than the first: 0.05 is 5%."""
    values = np.asarray(medians, dtype=np.float64)
    half = len(values) // 2
    if half == 0:
        return 0.0
    return float(np.median(values[-half:]) / np.median(values[:half]) - 1)


def ratio(baseline: ArrayLike, subject: ArrayLike, *, seed: int = 0) -> dict[str, Any]:
    """How many times faster the subject is, from blocks measured in turn.

    The geometric mean over rounds of baseline / subject, each a block's median, so that
    what slows a round slows both sides of its quotient. The interval is the central 95% of
    2,000 bootstrap resamples of the rounds.

    Args:
        baseline, subject: [rounds] block medians.
    """
    logs = np.log(np.asarray(baseline, dtype=np.float64) / np.asarray(subject, dtype=np.float64))
    picks = np.random.default_rng(seed).integers(0, len(logs), (_RESAMPLES, len(logs)))
    return _interval(logs.mean(), logs[picks].mean(axis=1))


def unpaired_ratio(baseline: ArrayLike, subject: ArrayLike, *, seed: int = 0) -> dict[str, Any]:
    """The same from two separate runs, whose blocks are resampled apart."""
    rng = np.random.default_rng(seed)
    means, samples = [], []
    for blocks in (baseline, subject):
        logs = np.log(np.asarray(blocks, dtype=np.float64))
        picks = rng.integers(0, len(logs), (_RESAMPLES, len(logs)))
        means.append(logs.mean())
        samples.append(logs[picks].mean(axis=1))
    return _interval(means[0] - means[1], samples[0] - samples[1])


def _interval(center: float, samples: NDArray[np.float64]) -> dict[str, Any]:
    low, high = np.quantile(samples, [0.025, 0.975])
    return {"ratio": float(np.exp(center)), "ci95": [float(np.exp(low)), float(np.exp(high))]}
