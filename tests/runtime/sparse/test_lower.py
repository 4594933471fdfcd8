"""Graphs as steps: what is taken, what is left and why, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from moon.errors import BackendError
from moon.runtime.sparse import steps as st
from moon.runtime.sparse.engine import SparseEngine
from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.lower import lower
from moon.runtime.sparse.model import read_model

from .graphs import Graph, lowered, reference

Build = Callable[[Graph], object]


def agree(graph: Graph, *outputs: str, whole: bool = True) -> None:
    """The engine gives what ONNX Runtime does; all by itself unless not ``whole``."""
    data = graph.data(*outputs)
    engine = SparseEngine(data, force=True)
    assert (engine.handed_over == "") == whole, engine.handed_over
    x = graph.images(3)
    got = engine.run(x)
    for one, expected in zip(
        got if isinstance(got, list) else [got], reference(data, x), strict=True
    ):
        assert one.shape == expected.shape
        np.testing.assert_allclose(one, expected, rtol=2e-5, atol=2e-5)


def norm(g: Graph, source: str, channels: int) -> str:
    numbers = [g.weight(channels) for _ in range(3)]
    variance = g.constant(np.linspace(0.5, 2, channels))
    return g.add("BatchNormalization", source, *numbers, variance, epsilon=1e-3)


def squeeze_excite(g: Graph) -> None:
    y = g.conv("x", 8, 6)
    y = g.add("Mul", y, g.add("Sigmoid", y))
    mean = g.add("ReduceMean", y, g.constant([2, 3], np.int64), keepdims=1)
    gate = g.add("Relu", g.conv(mean, 4, 8, 1))
    gate = g.add("HardSigmoid", g.conv(gate, 8, 4, 1), alpha=1 / 6)
    g.add("Mul", gate, y)


def vgg(g: Graph) -> None:
    y = g.add("Relu", g.conv("x", 5, 6))
    y = g.add("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    y = g.add("Flatten", y)
    y = g.add("Relu", g.add("Gemm", y, g.weight(5 * 4 * 5, 20), g.weight(20)))
    y = g.add("Dropout", y)
    g.add("Gemm", y, g.weight(7, 20, density=0.1), g.weight(7), transB=1)


def residual(g: Graph) -> None:
    y = g.add("Relu", norm(g, g.conv("x", 6, 6), 6))
    y = norm(g, g.conv(y, 6, 6), 6)
    y = g.add("Relu", g.add("Add", y, "x"))
    z = g.conv(y, 8, 6, strides=[2, 2])
    g.add("Relu", g.add("Add", g.conv(y, 8, 6, 1, strides=[2, 2]), z))


def dense(g: Graph) -> None:
    y = g.add("Relu", norm(g, "x", 6))
    y = g.add("Concat", "x", g.conv(y, 4, 6), "x", axis=1)
    g.add("Add", g.constant(np.arange(16).reshape(16, 1, 1)), y)


TAKEN: dict[str, Build] = {
    "group": lambda g: g.conv("x", 9, 2, group=3),
    "depth-wise": lambda g: g.conv("x", 12, 1, group=6, strides=[2, 2]),
    "dilation": lambda g: g.conv("x", 4, 6, dilations=[2, 1], pads=[2, 1, 2, 1]),
    "asymmetric": lambda g: g.conv("x", 4, 6, pads=[0, 2, 1, 0], strides=[1, 3]),
    "same upper": lambda g: g.conv("x", 4, 6, auto_pad="SAME_UPPER", strides=[2, 2]),
    "same lower": lambda g: g.conv("x", 4, 6, 2, auto_pad="SAME_LOWER", strides=[2, 3]),
    "valid": lambda g: g.conv("x", 4, 6, auto_pad="VALID"),
    "patches": lambda g: g.conv("x", 4, 6, 4, pads=[0, 0, 0, 2], strides=[4, 4]),
    "far apart": lambda g: g.conv("x", 4, 6, 1, strides=[1000, 1000]),
    "max ceil": lambda g: g.add(
        "MaxPool", "x", kernel_shape=[3, 3], strides=[2, 3], ceil_mode=1, pads=[1, 1, 1, 1]
    ),
    "average": lambda g: g.add(
        "AveragePool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 0, 1, 1]
    ),
    "average ceil": lambda g: g.add(
        "AveragePool", "x", kernel_shape=[3, 2], strides=[2, 2], ceil_mode=1
    ),
    "average with padding": lambda g: g.add(
        "AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 2, 1], count_include_pad=1
    ),
    "average same": lambda g: g.add(
        "AveragePool", "x", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"
    ),
    "mean": lambda g: g.add("GlobalAveragePool", "x"),
    "largest": lambda g: g.add("GlobalMaxPool", "x"),
    "largest by axes": lambda g: g.add(
        "ReduceMax", "x", g.constant([2, 3], np.int64), keepdims=0
    ),
    "largest of a window on all": lambda g: g.add(
        "MaxPool", "x", kernel_shape=list(g.shape[1:]), strides=[3, 2]
    ),
    "mean, rows": lambda g: g.add(
        "ReduceMean", "x", g.constant([-1, -2], np.int64), keepdims=0
    ),
    "squeeze": lambda g: g.add(
        "Squeeze", g.add("GlobalAveragePool", "x"), g.constant([2, -1], np.int64)
    ),
    "reshape": lambda g: g.add("Reshape", "x", g.constant([0, -1], np.int64)),
    "reshape to size": lambda g: g.add("Reshape", "x", g.constant([-1, 6 * 8 * 10], np.int64)),
    "product": lambda g: g.add("MatMul", g.add("Flatten", "x"), g.weight(480, 5)),
    "clip": lambda g: g.add("Clip", "x", g.constant(-0.5), g.constant(0.5)),
    "clip below": lambda g: g.add("Clip", "x", "", g.constant(0.5)),
    "leaky": lambda g: g.add("LeakyRelu", "x", alpha=0.2),
    "hard swish": lambda g: g.add("HardSwish", g.conv("x", 4, 6)),
    "hard sigmoid": lambda g: g.add("HardSigmoid", "x"),
    "silu": lambda g: g.add("Mul", g.add("Sigmoid", "x"), "x"),
    "norm": lambda g: norm(g, "x", 6),
    "norm after": lambda g: norm(g, g.conv("x", 4, 6), 4),
    "scale": lambda g: g.add("Mul", "x", g.constant(2.5)),
    "identity": lambda g: g.add("Relu", g.add("Identity", "x")),
    "gate of one pixel": lambda g: g.add("Mul", "x", g.add("GlobalAveragePool", "x")),
    "squeeze and excite": squeeze_excite,
    "vgg": vgg,
    "residual": residual,
    "dense": dense,
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_agrees_with_onnx_runtime(name: str) -> None:
    graph = Graph(6, 8, 10)
    TAKEN[name](graph)
    agree(graph)


LEFT: dict[str, tuple[Build, str]] = {
    "operator": (lambda g: g.add("Tanh", "x"), "is not known"),
    "two results": (
        lambda g: g.add("MaxPool", "x", outputs=2, kernel_shape=[2, 2]), "more than one result"
    ),
    "one dimension": (
        lambda g: g.add("Reshape", "x", g.constant([0, 2, -1], np.int64)), "flattening"
    ),
    "axis": (lambda g: g.add("Flatten", "x", axis=2), "axis is not 1"),
    "mean over channels": (
        lambda g: g.add("ReduceMean", "x", g.constant([1], np.int64)), "axes"
    ),
    "concat": (lambda g: g.add("Concat", "x", "x", axis=2), "channels"),
    "shapes": (
        lambda g: g.add("Add", "x", g.add("GlobalAveragePool", "x")), "different shapes"
    ),
    "pixels": (lambda g: g.add("Mul", "x", g.constant(np.ones((8, 10)))), "a number a channel"),
    "weight not constant": (
        lambda g: g.add("Conv", "x", g.add("Identity", "x")), "not constant"
    ),
    "transposed": (
        lambda g: g.add("Gemm", g.add("Flatten", "x"), g.weight(3, 9), transA=1), "transA"
    ),
    "alpha": (
        lambda g: g.add("Gemm", g.add("Flatten", "x"), g.weight(480, 9), alpha=2.0), "alpha"
    ),
    "rows": (lambda g: g.add("Sigmoid", g.add("Flatten", "x")), "does not read an image"),
    "matrix": (lambda g: g.add("MatMul", "x", g.weight(10, 4)), "does not read features"),
    "counting": (
        lambda g: g.add(
            "AveragePool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1],
            ceil_mode=1, count_include_pad=1,
        ),
        "counts padding",
    ),
    "constant first": (
        lambda g: g.add("Gemm", g.weight(3, 480), g.add("Identity", "x")), "not constant"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_is_named(name: str) -> None:
    graph = Graph(6, 8, 10)
    build, why = LEFT[name]
    last = build(graph)
    found = lowered(graph)
    assert why in found.first and str(last).replace("t", "n") in found.first
    assert [node.outputs[0] for node in found.rest][-1] == last


def test_the_rest_of_a_graph_is_left_to_onnx_runtime() -> None:
    graph = Graph(6, 8, 10)
    y = graph.add("Relu", graph.conv("x", 5, 6))
    left = graph.add("Tanh", y)
    z = graph.add("MaxPool", y, kernel_shape=[2, 2])
    features = graph.add("Flatten", z)
    both = graph.add("Add", left, left)
    agree(graph, both, features, y, whole=False)


def test_a_graph_of_which_nothing_is_taken() -> None:
    graph = Graph(6, 8, 10)
    graph.add("Tanh", "x")
    agree(graph, whole=False)


@pytest.mark.parametrize("shape", [[1, -1], [1, 480]])
def test_a_shape_may_count_on_the_number_of_images_where_it_is_fixed(shape: list[int]) -> None:
    graph = Graph(6, 8, 10)
    graph.add("Reshape", "x", graph.constant(shape, np.int64))
    assert lowered(graph, fixed=True).first == ""
    assert "flattening" in lowered(graph).first


def kinds(steps: tuple[st.Step, ...]) -> list[str]:
    return [
        type(one).__name__ + (f" {one.kind}" if isinstance(one, st.Point) else "") for one in steps
    ]


def test_a_residual_is_added_before_the_clamp() -> None:
    graph = Graph(6, 8, 10)
    residual(graph)
    steps = lowered(graph).steps
    assert kinds(steps) == ["Conv"] * 4
    second, last = steps[1], steps[3]
    assert isinstance(second, st.Conv) and isinstance(last, st.Conv)
    assert second.residual == "x" and (second.low, second.high) == (0, np.inf)
    assert last.residual == steps[2].target and last.low == 0


def test_what_something_else_reads_is_not_fused() -> None:
    graph = Graph(6, 8, 10)
    y = graph.conv("x", 6, 6)
    relu = graph.add("Relu", y)
    total = graph.add("Add", y, relu)
    assert kinds(lowered(graph).steps) == ["Conv", "Point clip", "Point add"]
    agree(graph, total)


def test_outputs_are_kept() -> None:
    graph = Graph(6, 8, 10)
    y = graph.conv("x", 6, 6)
    relu = graph.add("Relu", graph.add("Add", y, "x"))
    assert kinds(lowered(graph, y, relu).steps) == ["Conv", "Point add"]
    agree(graph, y, relu)


def test_a_clamp_before_the_addition_stays_before_it() -> None:
    graph = Graph(6, 8, 10)
    graph.add("Add", graph.add("Relu", graph.conv("x", 6, 6)), "x")
    found = lowered(graph).steps
    assert kinds(found) == ["Conv", "Point add"] or kinds(found)[-1] == "Point add"
    agree(graph)


def test_two_clamps_and_a_norm_after_a_clamp() -> None:
    graph = Graph(6, 8, 10)
    y = graph.add("Clip", graph.add("Relu", graph.conv("x", 6, 6)), "", graph.constant(0.4))
    norm(graph, y, 6)
    assert kinds(lowered(graph).steps) == ["Conv", "Point clip", "Point affine"]
    agree(graph)


def test_silu_is_one_step_only_where_it_is_one() -> None:
    graph = Graph(6, 8, 10)
    gate = graph.add("Sigmoid", "x")
    graph.add("Mul", gate, graph.conv("x", 6, 6))
    assert kinds(lowered(graph).steps) == ["Point sigmoid", "Conv", "Point mul"]
    agree(graph)
    graph = Graph(6, 8, 10)
    graph.add("Mul", "x", graph.add("Sigmoid", "x"))
    assert kinds(lowered(graph).steps) == ["Point silu"]


def test_a_name_made_twice_is_refused() -> None:
    graph = Graph(6, 8, 10)
    graph.conv("x", 6, 6)
    graph.add("Relu", "t0")
    model = read_model(graph.data())
    twice = replace(model, nodes=(*model.nodes, model.nodes[-1]))
    with pytest.raises(BackendError, match="made twice"):
        lower(twice, "x", Planes(6, 1, 8, 10))


def test_a_name_like_one_of_ours_does_no_harm() -> None:
    graph = Graph(6, 8, 10)
    y = graph.add("Relu", "x")
    z = graph.conv(y, 4, 6, strides=[2, 2])
    graph.conv("x", 4, 6, strides=[2, 2])
    graph._nodes[0].output[0] = graph._nodes[1].input[0] = "x by phase"
    agree(graph, z, "t2")


@pytest.mark.parametrize("op", ["Conv", "MaxPool", "LpPool"])
def test_paddings_below_nothing_are_refused_wherever_they_are(op: str) -> None:
    graph = Graph(6, 8, 10)
    y = graph.add("Tanh", "x")  # from here on all is left
    more = [graph.weight(6, 6, 2, 2)] if op == "Conv" else []
    graph.add(op, y, *more, kernel_shape=[2, 2], pads=[0, 0, 0, -1])
    with pytest.raises(BackendError, match="negative"):
        SparseEngine(graph.data())


def test_huge_sizes_are_left_alone() -> None:
    for attributes in (
        {"pads": [1 << 19] * 4}, {"dilations": [1 << 30, 1]},
        {"strides": [0, 1]}, {"kernel_shape": [3, 4]}, {"group": 4}, {"auto_pad": "NEVER"},
    ):  # fmt: skip
        graph = Graph(6, 8, 10)
        graph.conv("x", 6, 6, **attributes)
        assert lowered(graph).first.startswith("n0 (Conv): "), attributes
