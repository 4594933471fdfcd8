"""What int8 brings on this CPU: bytes of a sparse ResNet-18, and how fast ONNX Runtime runs it.

    taskset -c 0 python benchmarks/int8.py [--sparsity 0.9 0.95 0.99] [--rounds 40] [--size 32]

The network is benchmarks/bytes.py's: random weights, random masks by ERK. The ranges are measured
on noise, which moves neither bytes nor speed; what int8 changes in answers is measured on real
images, by every export (docs/int8.md). Times are of one image on one thread, each backend in turn
in every round, as the thread's own CPU time, so that a busy machine disturbs them less; the ratio
is the median of each round's, with the interval of the median from the order statistics.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from bytes import OUTPUTS, sparse_net
from onnx import ModelProto
from rich.console import Console
from rich.table import Table
from scipy.stats import binom

from moon.export.checks import check_packed
from moon.export.head import add_head
from moon.export.int8 import to_int8
from moon.export.pack import pack, round_values
from moon.export.trace import trace
from moon.runtime import SparseEngine
from moon.runtime.onnxruntime import open_session

Run = Callable[[], object]


def forms(sparsity: float, size: int) -> dict[str, ModelProto]:
    """The packed graph by name, and ``dense``, the plain one."""
    body = trace(sparse_net(sparsity, 0, size=(size, size)), channels=3, size=(size, size))
    noise = np.random.default_rng(0).standard_normal((64, 3, size, size)).astype(np.float32)
    int8 = to_int8(body, [noise[i : i + 16] for i in range(0, 64, 16)])
    made = {}
    for name, graph, values in (
        ("compact fp32", body, "fp32"),
        ("compact fp16", body, "fp16"),
        ("compact int8", int8, "fp16"),
    ):
        whole = add_head(graph, outputs=OUTPUTS, unknown_index=OUTPUTS - 1)
        rounded = round_values(whole, values)
        packed = pack(rounded, values=values)
        check_packed(packed, rounded)
        made[name] = packed
    made["dense"] = add_head(body, outputs=OUTPUTS, unknown_index=OUTPUTS - 1)
    made["dense int8"] = add_head(int8, outputs=OUTPUTS, unknown_index=OUTPUTS - 1)
    return made


def times(runs: Mapping[str, Run], rounds: int) -> dict[str, np.ndarray]:
    """CPU milliseconds of every round, after five that do not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 5):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            if i >= 5:
                found[name].append((time.thread_time() - start) * 1e3)
    return {name: np.array(values) for name, values in found.items()}


def ratio(of: np.ndarray, to: np.ndarray) -> str:
    """Median of each round's ratio with its 95% interval."""
    values = np.sort(of / to)
    low = int(binom.ppf(0.025, len(values), 0.5))
    return f"{np.median(values):.2f} ({values[low]:.2f} to {values[-1 - low]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.99])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--size", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Table(title="model.onnx, of dense fp32")
    speed = Table(title="CPU ms an image, batch 1, one thread; in brackets times ONNX Runtime fp32")
    names = ("compact fp32", "compact fp16", "compact int8", "dense int8")
    for column in ("sparsity", *names):
        sizes.add_column(column, justify="right")
    for column in ("sparsity", "ONNX Runtime fp32", "ONNX Runtime int8", "sparse fp32",
                   "sparse, given int8"):  # fmt: skip
        speed.add_column(column, justify="right")
    for sparsity in given.sparsity:
        made = forms(sparsity, given.size)
        dense = made["dense"].ByteSize()
        sizes.add_row(f"{sparsity:.0%}", *(f"{made[n].ByteSize() / dense:.2%}" for n in names))
        measured = times(_runs(made, given.size), given.rounds)
        base = measured["ONNX Runtime fp32"]
        cells = [
            f"{np.median(ms):.2f} [{ratio(base, ms)}]" if ms is not base else f"{np.median(ms):.2f}"
            for ms in measured.values()
        ]
        speed.add_row(f"{sparsity:.0%}", *cells)
    console = Console(width=130)
    console.print(sizes)
    console.print(speed)
    console.print(
        f"ResNet-18 at {given.size}x{given.size}; onnxruntime {onnxruntime.__version__}, "
        f"{platform.machine()}, {_flags()}; {given.rounds} rounds"
    )


def _runs(made: Mapping[str, ModelProto], size: int) -> dict[str, Run]:
    image = np.random.default_rng(1).standard_normal((1, 3, size, size)).astype(np.float32)
    wide, narrow = (made[f"compact {kind}"].SerializeToString() for kind in ("fp32", "int8"))
    sessions = {
        "ONNX Runtime fp32": open_session(wide),
        "ONNX Runtime int8": open_session(narrow),
    }
    runs: dict[str, Run] = {
        name: lambda session=session: session.run(["score"], {"input": image})
        for name, session in sessions.items()
    }
    for name, model in (("sparse fp32", wide), ("sparse, given int8", narrow)):
        engine = SparseEngine(model, threads=1)
        runs[name] = lambda engine=engine: engine.run(image)
    return runs


def _flags() -> str:
    """Whether the CPU multiplies int8 in one instruction."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "CPU flags unknown"
    return "with VNNI" if "vnni" in text else "without VNNI"


if __name__ == "__main__":
    main()
