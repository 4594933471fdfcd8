from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from moon.export.fold import fold_batch_norm
from moon.export.graph import array, initializers
from moon.export.session import run

NORM = ("gamma", "beta", "mean", "var")


def model(
    *, bias: bool = False, shared: bool = False, tapped: bool = False, pooled: bool = False
) -> ModelProto:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 4, 3, 3)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.7] = 0
    tensors: dict[str, NDArray[Any]] = {
        "w": weight,
        "gamma": np.array([1, -2, 0.5, 0], np.float32),
        "beta": np.array([0, 1, -1, 0.5], np.float32),
        "mean": np.array([0.1, 0.2, 0.3, -0.4], np.float32),
        "var": np.array([1, 2, 0.5, 0.1], np.float32),
    }
    if bias:
        tensors["b"] = np.array([1, 2, 3, 4], np.float32)
    conv = ["w", "b"] if bias else ["w"]
    nodes = [
        helper.make_node("Conv", ["input", *conv], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", *NORM], ["n"], epsilon=1e-3),
    ]
    last = "n"
    if pooled:
        nodes[1].input[0] = "p"
        pads = [1, 1, 1, 1]
        nodes.insert(1, helper.make_node("MaxPool", ["c"], ["p"], kernel_shape=[3, 3], pads=pads))
    if shared:
        nodes.append(helper.make_node("Conv", ["n", "w"], ["d"], pads=[1, 1, 1, 1]))
        last = "d"
    if tapped:
        nodes.append(helper.make_node("Add", ["n", "c"], ["s"]))
        last = "s"
    shape = ["N", 4, 6, 6]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def outputs(graph: ModelProto) -> NDArray[Any]:
    images = np.random.default_rng(1).standard_normal((2, 4, 6, 6)).astype(np.float32)
    (values,) = run(graph, {"input": images}).values()
    return values


@pytest.mark.parametrize("bias", [False, True])
def test_folding_keeps_the_answers_and_the_zeros(bias: bool) -> None:
    graph = model(bias=bias)
    expected = outputs(graph)
    zeros = array(initializers(graph)["w"]) == 0
    assert fold_batch_norm(graph) == 1
    assert [node.op_type for node in graph.graph.node] == ["Conv"]
    np.testing.assert_allclose(outputs(graph), expected, atol=1e-5)
    assert not array(initializers(graph)["w"])[zeros].any()
    assert not {*NORM} & set(initializers(graph))


@pytest.mark.parametrize("case", ["shared", "tapped", "pooled"])
def test_what_others_read_or_change_is_not_folded(case: str) -> None:
    graph = model(shared=case == "shared", tapped=case == "tapped", pooled=case == "pooled")
    expected = outputs(graph)
    assert fold_batch_norm(graph) == 0
    np.testing.assert_array_equal(outputs(graph), expected)
