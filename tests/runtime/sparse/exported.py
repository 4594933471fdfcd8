"""A bundle of a small network, sparse enough for the engine to be worth it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from moon.bundle import Bundle
from moon.export import from_onnx

from .graphs import Graph


def export(folder: Path, *, width: int = 64, **options: Any) -> Bundle:
    """Random weights, every score, p-values, a gate; options as of ``from_onnx``.

    All three convolutions are 8x8: with 64 channels 64 (9 * 64 + 2 * 9 * 64 * 64) multiply-adds,
    0.4 of them left.
    """
    graph = Graph(1, 8, 8)
    y = graph.add("Relu", graph.conv("x", width, 1))
    y = graph.add("Relu", graph.add("Add", y, graph.conv(y, width, width)))
    y = graph.add("Relu", graph.conv(y, width, width))
    y = graph.add("Flatten", graph.add("GlobalAveragePool", y))
    graph.add("Gemm", y, graph.weight(10, width), graph.weight(10), transB=1)
    model = onnx.load_from_string(graph.data())
    sizes = model.graph.output[0].type.tensor_type.shape.dim
    sizes.add().dim_param, sizes.add().dim_value = "N", 10
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "own.onnx")
    settings = {"score": "vim", "carry": ["all"], "features": True, "p_values": True, **options}
    return from_onnx(
        folder / "own.onnx", folder / "out", classes=[str(i) for i in range(10)],
        data="sklearn:digits#test", fit="sklearn:digits#train", mean=(0.3,), std=(0.4,),
        **settings,
    )  # fmt: skip
