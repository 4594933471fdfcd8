"""Models that are right, to be broken."""

from __future__ import annotations

import numpy as np
import onnx

from .graphs import Graph
from .random_graphs import Seeded, grow, start

__all__ = ["seeds"]


def seeds() -> list[bytes]:
    """Models that are right."""
    found = []
    for seed in range(60):
        g = start(Seeded(seed))
        outputs = grow(g, 3 + seed % 9, left=seed % 3 == 0)
        data = g.data(*outputs)
        if len(data) < 20_000:
            found.append(data)
    special = [*map(_head, (1, 2)), _decoded(), _gated(), _branch(), _fixed()]
    return [*found, *special * 3]


def _head(seed: int) -> bytes:
    g = Graph(3, 9, 9)
    y = g.add("Relu", g.conv("x", 4, 3, strides=[seed, seed]))
    y = g.add("MaxPool", g.add("Add", y, y), kernel_shape=[2, 2], strides=[2, 2])
    y = g.add("Flatten", g.add("GlobalAveragePool", y))
    y = g.add("Gemm", y, g.weight(5, 4), g.weight(5), transB=1)
    return g.data(y, g.add("Softmax", y))


def _decoded() -> bytes:
    """A weight that operators make of its nonzeros, as compact files have it."""
    g = Graph(2, 5, 6)
    gaps = g.constant([1, 3, 2, 9, 4], np.int64)
    places = g.add("CumSum", gaps, g.constant(0, np.int64))
    zeros = g.add("ConstantOfShape", g.constant([54], np.int64))
    flat = g.add("ScatterElements", zeros, places, g.weight(5))
    weight = g.add("Reshape", flat, g.constant([3, 2, 3, 3], np.int64))
    g.add("Relu", g.add("Conv", "x", weight, pads=[1, 1, 1, 1]))
    return g.data()


def _gated() -> bytes:
    """A decision by a threshold that may be fed."""
    g = Graph(2, 5, 6)
    y = g.add("Flatten", g.add("Relu", g.conv("x", 4, 1, group=2)))
    y = g.add("Gemm", y, g.weight(120, 7, density=0.1), g.weight(7))
    top = g.add("ReduceMax", y, g.constant([1], np.int64), keepdims=0)
    threshold = g.constant(0.3)
    accept, label = g.add("GreaterOrEqual", top, threshold), g.add("ArgMax", y, axis=1)
    model = onnx.load_from_string(g.data(y, top))
    for name, kind in ((accept, onnx.TensorProto.BOOL), (label, onnx.TensorProto.INT64)):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    given = onnx.helper.make_tensor_value_info(threshold, onnx.TensorProto.FLOAT, [])
    model.graph.input.append(given)
    return model.SerializeToString()


def _branch() -> bytes:
    """A graph within the graph, which reads what the engine makes."""
    g = Graph(2, 4, 4)
    y = g.add("Relu", g.conv("x", 3, 2))
    info = onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None)
    ways = [
        onnx.helper.make_graph([onnx.helper.make_node(op, [y], ["z"])], op, [], [info])
        for op in ("Neg", "Abs")
    ]
    yes = g.add("Greater", g.add("ReduceMax", y, keepdims=0), g.constant(0.5))
    g.add("If", yes, then_branch=ways[0], else_branch=ways[1])
    return g.data()


def _fixed() -> bytes:
    """For three images and no others."""
    g = Graph(2, 6, 5, batch=3)
    y = g.add("AveragePool", g.conv("x", 4, 2), kernel_shape=[2, 2], strides=[2, 1])
    g.add("Reshape", g.add("Concat", y, y, axis=1), g.constant([3, -1], np.int64))
    return g.data()
