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
from moon.runtime.bench_energy import Energy
from moon.runtime.bench_stats import block_medians, drift, histogram, summary
from moon.runtime.timed import Parts, Timed
from moon.runtime.unpack import dense_model, weights

__all__ = ["Subject", "filled_model", "uses_gpu"]

# Sleeping wakes late by about this much; the rest of the wait is spent spinning.
_SPIN_S = 0.0005
_PARTS = ("host_to_device", "compute", "device_to_host")
_ON_A_GPU = ("CUDA", "Tensorrt", "TensorRT", "NvTensorRTRTX", "ROCM", "DirectML", "Dml")


@dataclass
class Subject:
    """A graph in a backend, loaded several times over, and what was measured of it so far.

    Attributes:
        name: ``dense``, or the backend's as the user spelled it.
        spelled: the backend's name.
        model: a bundle, or the bytes of a graph.
        inputs: [samples, ...] batches, used in turn.
        threads, spin: for one inference.
        settle: queries at the start of a block that are not counted: they find the caches of
            the other subject.
        transfers: count copies to and from a device.
    """

    name: str
    spelled: str
    model: Bundle | bytes
    inputs: list[NDArray[Any]]
    threads: int
    spin: bool
    settle: int = 2
    transfers: bool = True
    loads_ms: list[float] = field(default_factory=list)
    first_ms: list[tuple[float, float]] = field(default_factory=list)
    blocks: list[list[float]] = field(default_factory=list)
    spans: list[float] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    marks: list[tuple[list[object], list[object]]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._next: Iterator[NDArray[Any]] = cycle(self.inputs)
        self._backend: Backend | None = None

    @property
    def samples(self) -> int:
        """Images in one query."""
        return len(self.inputs[0])

    @property
    def backend(self) -> Backend:
        assert self._backend is not None, "load comes first"
        return self._backend

    def load(self) -> None:
        """Open the backend, in place of one opened before, and time that and two inferences.

        The old one is let go of last, so that the new one lies elsewhere in memory.
        """
        start = time.perf_counter()
        opened = open_backend(
            self.model, self.spelled, threads=self.threads, spin=self.spin, warn=self._hear
        )
        self.loads_ms.append((time.perf_counter() - start) * 1e3)
        first = []
        for _ in range(2):
            start = time.perf_counter()
            opened.run(self.inputs[0])
            first.append((time.perf_counter() - start) * 1e3)
        self.first_ms.append((first[0], first[1]))
        self._backend, old = opened, self._backend
        close = getattr(old, "close", None)
        if close is not None:
            close()
        self._timed = opened if isinstance(opened, Timed) else None

    def warm_up(self, queries: int, limit_s: float | None = None) -> float:
        """Run uncounted, until ``limit_s`` is over; the median seconds of a query."""
        times: list[float] = []
        start = time.perf_counter()
        while len(times) < max(queries, 1):
            times.append(self._query())
            if limit_s is not None and time.perf_counter() - start > limit_s:
                break
        self._forget_uncounted()
        return float(np.median(times)) / 1e3

    def block(self, queries: int, interval_s: float | None, energy: Energy) -> None:
        """Measure one block, closed loop, or open loop with an arrival every ``interval_s``."""
        for _ in range(self.settle):
            self._query()
        collecting = gc.isenabled()
        gc.disable()
        self._forget_uncounted()
        before = energy.mark()
        try:
            start = time.perf_counter()
            if interval_s is None:
                latencies = [self._query() for _ in range(queries)]
            else:
                latencies = self._open_loop(queries, interval_s)
            # The last arrival of an open loop also has its interval to itself.
            taken = time.perf_counter() - start
        finally:
            if collecting:
                gc.enable()
        self.marks.append((before, energy.mark()))
        self.spans.append(max(taken, queries * (interval_s or 0.0)))
        self.blocks.append(latencies)
        self.groups.append(len(self.loads_ms) - 1)

    def _query(self) -> float:
        batch = next(self._next)
        if self._timed is None:
            start = time.perf_counter()
            self.backend.run(batch)
            return (time.perf_counter() - start) * 1e3
        start = time.perf_counter()
        _, parts = self._timed.timed(batch)
        taken = (time.perf_counter() - start) * 1e3
        self._note(parts)
        if self.transfers:
            return taken
        return taken - parts.host_to_device_ms - parts.device_to_host_ms

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

    def _note(self, parts: Parts) -> None:
        for name in _PARTS:
            self.parts.setdefault(name, []).append(getattr(parts, f"{name}_ms"))

    def _forget_uncounted(self) -> None:
        counted = sum(map(len, self.blocks))
        for values in self.parts.values():
            del values[counted:]

    def _hear(self, line: str) -> None:
        if line not in self.said:
            self.said.append(line)

    def medians(self) -> NDArray[np.float64]:
        """The median latency of each block, in milliseconds."""
        return block_medians(self.blocks)

    def figures(self, energy: Energy) -> tuple[dict[str, Any], dict[str, str]]:
        """Everything measured, as the result holds it, and why what is null is."""
        every = [latency for block in self.blocks for latency in block]
        images = len(every) * self.samples
        parts = {name: summary(values) for name, values in self.parts.items()}
        whole = summary(every)
        used, reason = energy.figures(self.marks, sum(self.spans), images)
        unavailable = {} if used is not None else {"energy": reason}
        if not parts:
            why = "the backend computes in host memory"
            if uses_gpu(self.backend.info()):
                why = "the backend does not tell copies from computing"
            unavailable |= {"host_to_device_ms": why, "device_to_host_ms": why}
        compute = parts["compute"]["p50"] if parts else None
        if compute is None and not uses_gpu(self.backend.info()):
            compute = whole["p50"]
        return {
            "latency_ms": whole,
            "latency_histogram": histogram(every),
            "block_p50_ms": self.medians().tolist(),
            "block_load": list(self.groups),
            "drift": drift(self.medians()),
            "host_to_device_ms": parts["host_to_device"]["p50"] if parts else None,
            "compute_ms": compute,
            "device_to_host_ms": parts["device_to_host"]["p50"] if parts else None,
            "parts_ms": parts or None,
            "throughput": images / sum(self.spans),
            "energy": used,
        }, unavailable


def uses_gpu(info: dict[str, Any]) -> bool:
    """Whether what a backend says of itself is that it computes on a GPU."""
    return "gpu" in info or any(word in str(info.get("provider")) for word in _ON_A_GPU)


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
