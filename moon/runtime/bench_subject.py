"""One thing that is measured: a graph in a backend, its inputs, and its blocks of latencies."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle
from moon.runtime.backend import Backend, open_backend
from moon.runtime.bench_host import EnergyMeter
from moon.runtime.bench_stats import block_medians, drift, histogram, summary
from moon.runtime.unpack import dense_model, weights

__all__ = ["Subject", "filled_model", "load"]

# Queries at the start of a block that are not counted: they find the caches of the other model.
SETTLE = 2
# Sleeping wakes late by about this much; the rest of the wait is spent spinning.
_SPIN_S = 0.0005


@dataclass
class Subject:
    """A loaded graph and what was measured of it so far."""

    name: str
    backend: Backend
    inputs: list[NDArray[Any]]
    load_ms: float
    first_ms: tuple[float, float]
    blocks: list[list[float]] = field(default_factory=list)
    spans: list[float] = field(default_factory=list)
    joules: float = 0.0

    def __post_init__(self) -> None:
        self._next: Iterator[NDArray[Any]] = cycle(self.inputs)

    @property
    def samples(self) -> int:
        """Images in one query."""
        return len(self.inputs[0])

    def warm_up(self, queries: int) -> float:
        """Run uncounted; returns the seconds of a query, the median of those run."""
        times = [self._query() for _ in range(max(queries, 1))]
        return float(np.median(times)) / 1e3

    def block(self, queries: int, interval_s: float | None, meter: EnergyMeter) -> None:
        """Measure one block, closed loop, or open loop with an arrival every ``interval_s``."""
        for _ in range(SETTLE):
            self._query()
        before = meter.read()
        collecting = gc.isenabled()
        gc.disable()
        try:
            start = time.perf_counter()
            if interval_s is None:
                latencies = [self._query() for _ in range(queries)]
            else:
                latencies = self._open_loop(queries, interval_s)
            # The last arrival of an open loop also has its interval to itself.
            taken = time.perf_counter() - start
            self.spans.append(max(taken, queries * (interval_s or 0.0)))
        finally:
            if collecting:
                gc.enable()
        self.blocks.append(latencies)
        self.joules += meter.since(before)

    def _query(self) -> float:
        batch = next(self._next)
        start = time.perf_counter()
        self.backend.run(batch)
        return (time.perf_counter() - start) * 1e3

    def _open_loop(self, queries: int, interval_s: float) -> list[float]:
        """Latencies from when a query was due, not from when it could start."""
        latencies = []
        start = time.perf_counter()
        for i in range(queries):
            due = start + i * interval_s
            wait = due - time.perf_counter()
            if wait > _SPIN_S:
                time.sleep(wait - _SPIN_S)
            while time.perf_counter() < due:
                pass
            self._query()
            latencies.append((time.perf_counter() - due) * 1e3)
        return latencies

    def medians(self) -> NDArray[np.float64]:
        """The median latency of each block, in milliseconds."""
        return block_medians(self.blocks)

    def figures(self, meter: EnergyMeter) -> dict[str, Any]:
        """Everything measured, as the result holds it."""
        every = [latency for block in self.blocks for latency in block]
        images = len(every) * self.samples
        return {
            "load_ms": self.load_ms,
            "first_inference_ms": {"cold": self.first_ms[0], "warm": self.first_ms[1]},
            "latency_ms": summary(every),
            "latency_histogram": histogram(every),
            "block_p50_ms": self.medians().tolist(),
            "drift": drift(self.medians()),
            "host_to_device_ms": None,
            "compute_ms": summary(every)["p50"],
            "device_to_host_ms": None,
            "throughput": images / sum(self.spans),
            "energy": {"joules_per_image": self.joules / images} if meter.readable else None,
        }


def load(
    name: str,
    model: Bundle | bytes,
    backend: str,
    inputs: list[NDArray[Any]],
    *,
    threads: int,
    spin: bool,
) -> Subject:
    """Load a graph and time that and its first two inferences."""
    start = time.perf_counter()
    opened = open_backend(model, backend, threads=threads, spin=spin)
    load_ms = (time.perf_counter() - start) * 1e3
    first = []
    for _ in range(2):
        start = time.perf_counter()
        opened.run(inputs[0])
        first.append((time.perf_counter() - start) * 1e3)
    return Subject(name, opened, inputs, load_ms, (first[0], first[1]))


def filled_model(model: bytes, *, seed: int = 0) -> bytes:
    """The same graph made dense: its weights' zeros drawn from the scale of the others.

    What the graph computes is meaningless, and as costly as a dense model's.

    Raises:
        BackendError: the package onnx is missing.
    """
    dense = dense_model(model)
    import onnx

    proto = onnx.load_model_from_string(dense)
    names = set(weights(model))
    rng = np.random.default_rng(seed)
    for tensor in proto.graph.initializer:
        if tensor.name not in names:
            continue
        values = np.array(onnx.numpy_helper.to_array(tensor))
        zeros = values == 0
        scale = float(values[~zeros].astype(np.float64).std()) if (~zeros).any() else 0.0
        drawn = rng.normal(0, scale or 0.01, int(zeros.sum()))
        values[zeros] = drawn.astype(values.dtype)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    filled: bytes = proto.SerializeToString()
    return filled
