"""Bytes of a sparse ResNet-18 in each form, and whether ONNX Runtime's answers are bit-equal.

    python benchmarks/bytes.py [--sparsity 0.95] [--seed 0]

The network is ResNet-18 for small images (3x3 stem, no max-pool, 11 outputs), its weights random,
its masks random with layer densities by ERK. Load time is the fastest of five.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto
from rich.console import Console
from rich.table import Table

from moon.errors import ExportError
from moon.export.checks import check_onnx, check_packed
from moon.export.head import add_head
from moon.export.pack import VALUES, WEIGHTS, pack, round_values
from moon.export.trace import trace
from moon.runtime.onnxruntime import open_session
from moon.trainer.models import build
from moon.trainer.sparsity.budget import counts, densities
from moon.trainer.sparsity.topology import find_layers, generator, random_mask

OUTPUTS, SIZE = 11, (32, 32)


@dataclass(frozen=True)
class Row:
    weights: str
    values: str
    size: int
    share: float
    exact: bool
    load_ms: float
    checker: str


def sparse_net(
    sparsity: float, seed: int, *, model: str = "resnet18", size: tuple[int, int] = SIZE
) -> torch.nn.Module:
    """The network with random weights and masks."""
    net = build(model, outputs=OUTPUTS, channels=3, size=size, seed=seed)
    layers = find_layers(net)
    kept = counts(layers, densities(layers, 1 - sparsity, "erk"))
    with torch.no_grad():
        for layer in layers:
            draw = generator(seed, 0, layer.name)
            layer.weight.mul_(random_mask(layer.weight, kept[layer.name], draw))
    return net


def sparse_resnet18(sparsity: float, seed: int) -> ModelProto:
    """The traced graph with its score head."""
    graph = trace(sparse_net(sparsity, seed), channels=3, size=SIZE)
    return add_head(graph, outputs=OUTPUTS, unknown_index=OUTPUTS - 1)


def load_and_run(data: bytes, images: np.ndarray) -> tuple[list[np.ndarray], float]:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        session = open_session(data, threads=1)
        times.append(time.perf_counter() - start)
    return session.run(None, {"input": images}), min(times) * 1e3


def checked(model: ModelProto) -> str:
    for full in (True, False):
        try:
            check_onnx(model, full=full)
        except ExportError:
            continue
        return "full" if full else "without shapes"
    return "refused"


def measure(sparsity: float, seed: int) -> list[Row]:
    model = sparse_resnet18(sparsity, seed)
    images = np.random.default_rng(seed).standard_normal((7, 3, *SIZE)).astype(np.float32)
    rows = []
    for values in VALUES:
        rounded = round_values(model, values)
        expected, _ = load_and_run(rounded.SerializeToString(), images)
        for weights in WEIGHTS:
            packed = pack(model, weights=weights, values=values)
            check_packed(packed, rounded)
            data = packed.SerializeToString()
            got, load_ms = load_and_run(data, images)
            same = all(a.tobytes() == b.tobytes() for a, b in zip(expected, got, strict=True))
            share = len(data) / model.ByteSize()
            rows.append(Row(weights, values, len(data), share, same, load_ms, checked(packed)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"ResNet-18, {given.sparsity:.1%} sparse, bytes of model.onnx")
    for column in ("weights", "values", "bytes", "of dense fp32", "outputs", "load", "checker"):
        table.add_column(column, justify="left" if column in ("weights", "values") else "right")
    for row in measure(given.sparsity, given.seed):
        equal = "bit-equal" if row.exact else "DIFFERENT"
        table.add_row(
            row.weights, row.values, f"{row.size:,}", f"{row.share:.2%}", equal,
            f"{row.load_ms:.1f} ms", row.checker,
        )  # fmt: skip
    console = Console(width=110)
    console.print(table)
    console.print(
        f"outputs: against dense weights rounded alike; onnx {onnx.__version__}, "
        f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, {platform.machine()}"
    )


if __name__ == "__main__":
    main()
