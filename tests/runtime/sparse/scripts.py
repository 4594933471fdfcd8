"""Programs run in a process of their own: what ends a process, or depends on its surroundings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .graphs import Graph, engaged

__all__ = ["network", "output", "script", "started"]

ROOT = Path(__file__).parents[3]
_HEAD = """
import os, signal, sys, threading, time
import numpy as np
from moon.errors import MoonError
from tests.runtime.sparse.graphs import engaged
from tests.runtime.sparse.scripts import network, output
data, x = network()
"""


def network() -> tuple[bytes, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """A small network with strides, a residual, pooling and a linear layer; five images."""
    graph = Graph(3, 12, 16)
    y = graph.add("Relu", graph.conv("x", 8, 3, strides=[2, 2]))
    y = graph.add("Relu", graph.add("Add", graph.conv(y, 8, 8), y))
    y = graph.add("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    y = graph.add("Flatten", graph.add("GlobalAveragePool", graph.add("Sigmoid", y)))
    graph.add("Gemm", y, graph.weight(10, 8), graph.weight(10), transB=1)
    return graph.data(), graph.images(5)


def output(threads: int = 1) -> str:
    """What the network makes, as text."""
    data, x = network()
    found = engaged(data, threads=threads).run(x)
    assert isinstance(found, np.ndarray)
    return found.tobytes().hex()


def started(
    text: str, environment: Mapping[str, str | None] | None = None
) -> subprocess.Popen[str]:
    """A program under way; a variable that is None is not set."""
    wanted = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-W", "default", "-c", _HEAD + text],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={name: value for name, value in wanted.items() if value is not None},
    )  # fmt: skip


def script(text: str, environment: Mapping[str, str | None] | None = None) -> str:
    """What a program prints; it must end well and complain of nothing."""
    process = started(text, environment)
    try:
        out, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        raise AssertionError(f"it hangs: {out[-500:]} {errors[-2000:]}") from None
    assert process.returncode == 0, (process.returncode, errors[-3000:])
    assert not errors, errors
    return out.strip()
