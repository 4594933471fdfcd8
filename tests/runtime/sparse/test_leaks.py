"""Memory and threads come back: after calls, after errors, after engines."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moon.errors import UsageError
from moon.runtime.sparse.engine import SparseEngine

from .graphs import Graph, engaged
from .scripts import network

STATM = Path("/proc/self/statm")
pytestmark = pytest.mark.skipif(not STATM.exists(), reason="no /proc")
_MEGABYTE = 1 << 20


def resident() -> int:
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(step: Callable[[], object], warm: int, times: int) -> int:
    """Bytes that remain after ``times`` steps."""
    for _ in range(warm):
        step()
    before = resident()
    for _ in range(times):
        step()
    return resident() - before


def tiny() -> SparseEngine:
    graph = Graph(2, 4, 4)
    y = graph.add("Relu", graph.conv("x", 3, 2))
    graph.add("Gemm", graph.add("Flatten", y), graph.weight(48, 3), graph.weight(3))
    return engaged(graph.data())


def test_five_thousand_calls() -> None:
    engine, x = tiny(), np.ones((1, 2, 4, 4), np.float32)
    assert growth(lambda: engine.run(x), 1000, 5000) < _MEGABYTE // 2
    engine.close()


@pytest.mark.slow
def test_a_hundred_thousand_calls() -> None:
    engine, x = tiny(), np.ones((1, 2, 4, 4), np.float32)
    assert growth(lambda: engine.run(x), 5000, 100_000) < _MEGABYTE // 2
    engine.close()


def test_batches_of_many_sizes() -> None:
    data, x = network()
    engine, many = engaged(data, threads=2), np.concatenate([x] * 3)

    def step() -> None:
        for count in range(1, 13):
            engine.run(many[:count])

    assert growth(step, 3, 12) < 4 * _MEGABYTE
    engine.close()


def test_refused_inputs() -> None:
    engine, x = tiny(), np.full((64, 2, 4, 4), np.nan, np.float32)

    def step() -> None:
        with pytest.raises(UsageError, match="NaN"):
            engine.run(x)

    assert growth(step, 50, 500) < _MEGABYTE // 2
    engine.close()


@pytest.mark.parametrize("closed", [True, False])
def test_engines_come_and_go(closed: bool) -> None:
    data, x = network()

    def step() -> None:
        engine = engaged(data, threads=2)
        engine.run(x)
        if closed:
            engine.close()

    grown = growth(step, 10, 40)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not [one for one in threading.enumerate() if one.name.startswith("moon-engine")]:
            break
        time.sleep(0.01)
    else:
        raise AssertionError("threads remain")
    assert grown < 3 * _MEGABYTE
    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    step()
    assert len(os.listdir("/proc/self/fd")) <= files  # noqa: PTH208
