"""Latencies to figures: percentiles, drift, and a ratio with its interval and verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "BODY_BINS",
    "block_medians",
    "by_group",
    "drift",
    "histogram",
    "interval",
    "ratio",
    "summary",
    "unpaired",
    "verdict",
]

BODY_BINS, _TAIL_BINS = 40, 20


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
    """Counts in bins of equal ratio: 40 up to the 90th percentile, 20 from there to the largest.

    The few slow ones may be a hundred times as slow; bins of one width would have no room for
    the others.
    """
    values = np.asarray(latencies_ms, dtype=np.float64)
    low = max(float(values.min()), 1e-6)
    middle = max(float(np.percentile(values, 90, method="inverted_cdf")), low * (1 + 1e-6))
    high = max(float(values.max()), middle) * (1 + 1e-6)
    body, tail = (
        np.geomspace(low, middle, BODY_BINS + 1),
        np.geomspace(middle, high, _TAIL_BINS + 1),
    )
    edges = np.concatenate([body, tail[1:]])
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


def by_group(medians: ArrayLike, groups: Sequence[int]) -> NDArray[np.float64]:
    """Mean of the logarithms of block medians in each group; by block where there is one group.

    A group is what was measured with one loading of the model. Loaded again it lies elsewhere in
    memory and runs at a slightly different speed, for as long as it is loaded: blocks of one
    loading say nothing of the next one.
    """
    logs = np.log(np.asarray(medians, dtype=np.float64))
    labels = np.asarray(groups)
    names = np.unique(labels)
    if len(names) < 2:
        return logs
    return np.array([logs[labels == name].mean() for name in names])


def ratio(baseline: ArrayLike, subject: ArrayLike, groups: Sequence[int] = ()) -> dict[str, Any]:
    """How many times faster the subject is, from blocks measured in turn.

    The geometric mean of baseline / subject, each a block's median, over rounds, so that what
    slows a round slows both sides of its quotient.

    Args:
        baseline, subject: [rounds] block medians.
        groups: [rounds] which loading a round belongs to; rounds are groups by themselves
            without.
    """
    quotients = np.asarray(baseline, dtype=np.float64) / np.asarray(subject, dtype=np.float64)
    return interval(by_group(quotients, groups or [0] * len(quotients)))


def interval(logs: ArrayLike) -> dict[str, Any]:
    """``ratio`` and its 95% interval, by Student's t, of independent measurements of it.

    Args:
        logs: of the ratio, natural; with one alone there is no interval, and it is None.
    """
    values = np.asarray(logs, dtype=np.float64)
    center = float(values.mean())
    if len(values) < 2:
        return {"ratio": math.exp(center), "ci95": None}
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return _around(center, _student(len(values) - 1) * error)


def unpaired(baseline: ArrayLike, subject: ArrayLike) -> dict[str, Any]:
    """The same of two separate runs, by Welch's approximation.

    Args:
        baseline, subject: logarithms of independent measurements of each.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (baseline, subject)]
    center = float(sides[0].mean() - sides[1].mean())
    if min(map(len, sides)) < 2:
        return {"ratio": math.exp(center), "ci95": None}
    squares = [float(side.var(ddof=1)) / len(side) for side in sides]
    total = sum(squares)
    if total == 0:
        return _around(center, 0.0)
    spread = sum(square**2 / (len(side) - 1) for square, side in zip(squares, sides, strict=True))
    return _around(center, _student(total**2 / spread) * math.sqrt(total))


def verdict(speedup: dict[str, Any]) -> str:
    """What an interval shows: ``faster``, ``slower`` or ``no difference shown``."""
    ci95 = speedup["ci95"]
    if ci95 is None or ci95[0] <= 1 <= ci95[1]:
        return "no difference shown"
    return "faster" if ci95[0] > 1 else "slower"


def _around(center: float, half: float) -> dict[str, Any]:
    return {
        "ratio": math.exp(center),
        "ci95": [math.exp(center - half), math.exp(center + half)],
    }


def _student(freedom: float) -> float:
    """The 97.5% quantile of Student's t (Cornish-Fisher, Abramowitz and Stegun 26.7.5).

    Exact for 1 and 2 degrees of freedom; within 0.5% from 3 on.
    """
    if freedom < 1.5:
        return 12.706
    if freedom < 2.5:
        return 4.303
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))
