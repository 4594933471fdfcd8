from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moon.errors import BundleError
from moon.runtime.onnxruntime import open_session
from moon.runtime.unpack import dense_model, weights
from tests.bundles import make_model

WEIGHT = np.zeros((4, 3), np.float32)
WEIGHT[1, 2], WEIGHT[3, 0] = 2.5, -1.5
X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def graph(
    nodes: list[onnx.NodeProto],
    tensors: dict[str, Any],
    *,
    inputs: tuple[str, ...] = (),
    outputs: tuple[str, ...] = ("y",),
) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4]),
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in inputs),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def packed() -> onnx.ModelProto:
    """A weight rebuilt from deltas: Cast, CumSum, ScatterElements, Reshape."""
    return graph(
        [
            helper.make_node("Cast", ["deltas"], ["wide"], to=TensorProto.INT64),
            helper.make_node("CumSum", ["wide", "axis"], ["positions"]),
            helper.make_node("Cast", ["values"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("ConstantOfShape", ["size"], ["blank"]),
            helper.make_node("ScatterElements", ["blank", "positions", "floats"], ["flat"], axis=0),
            helper.make_node("Constant", [], ["shape"], value_ints=[4, 3]),
            helper.make_node("Reshape", ["flat", "shape"], ["w"]),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        {
            "deltas": np.array([5, 4], np.uint8),
            "axis": np.array(0),
            "values": np.array([2.5, -1.5], np.float16),
            "size": np.array([12]),
        },
    )


def run(model: bytes, **feeds: np.ndarray) -> np.ndarray:
    result: np.ndarray = open_session(model).run(["y"], {"x": X, **feeds})[0]
    return result


def names(model: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_model_from_string(model).graph.node]


def test_a_packed_weight_becomes_dense() -> None:
    data = packed().SerializeToString()
    plain = dense_model(data)
    assert names(plain) == ["MatMul"]
    assert np.array_equal(weights(data)["w"], WEIGHT)
    assert np.array_equal(run(plain), run(data)) and np.allclose(run(plain), X @ WEIGHT)
    tensors = onnx.load_model_from_string(plain).graph.initializer
    assert [tensor.name for tensor in tensors] == ["w"]  # what fed the packing is gone
    assert dense_model(plain) == plain


@pytest.mark.parametrize("linear", [True, False])
def test_sparse_initializers_become_dense(linear: bool) -> None:
    model = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {})
    values = numpy_helper.from_array(np.array([2.5, -1.5], np.float32), "w")
    where = np.array([5, 9]) if linear else np.array([[1, 2], [3, 0]])
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(where, "i"), [4, 3])
    model.graph.sparse_initializer.append(sparse)
    assert np.array_equal(weights(model.SerializeToString())["w"], WEIGHT)
    assert np.allclose(run(dense_model(model.SerializeToString())), X @ WEIGHT)


def test_a_sparse_constant_becomes_dense() -> None:
    values = numpy_helper.from_array(np.array([2.5, -1.5], np.float32), "w")
    index = numpy_helper.from_array(np.array([5, 9]), "i")
    node = helper.make_node("Constant", [], ["w"], sparse_value=helper.make_sparse_tensor(values, index, [4, 3]))  # fmt: skip  # noqa: E501
    model = graph([node, helper.make_node("MatMul", ["x", "w"], ["y"])], {})
    assert np.array_equal(weights(model.SerializeToString())["w"], WEIGHT)


def test_what_can_be_overridden_or_is_random_stays() -> None:
    model = graph(
        [
            helper.make_node("Mul", ["w0", "scale"], ["w"]),
            helper.make_node("RandomNormalLike", ["bias0"], ["noise"], scale=1e-9),
            helper.make_node("MatMul", ["x", "w"], ["z"]),
            helper.make_node("Add", ["z", "noise"], ["y"]),
        ],
        {"w0": WEIGHT, "scale": np.float32(2), "bias0": np.zeros(3, np.float32)},
        inputs=("scale",),
    )
    plain = dense_model(model.SerializeToString())
    assert names(plain) == ["Mul", "RandomNormalLike", "MatMul", "Add"]
    assert weights(model.SerializeToString()) == {}
    assert np.allclose(run(plain, scale=np.array(3, np.float32)), 3 * X @ WEIGHT, atol=1e-6)


def test_a_constant_that_is_an_output_is_kept() -> None:
    model = graph(
        [
            helper.make_node("Neg", ["w0"], ["w"]),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        {"w0": -WEIGHT},
        outputs=("y", "w"),
    )
    plain = dense_model(model.SerializeToString())
    assert names(plain) == ["MatMul", "Constant"] or names(plain) == ["Constant", "MatMul"]
    found = open_session(plain).run(["y", "w"], {"x": X})
    assert np.array_equal(found[1], WEIGHT) and np.allclose(found[0], X @ WEIGHT)


def test_what_nested_graphs_read_is_kept() -> None:
    # The branch reads "w" from outside, where only constants make it.
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    model = graph(
        [
            helper.make_node("Neg", ["w0"], ["w"]),
            helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
            helper.make_node("Less", ["sum", "low"], ["choice"]),
            helper.make_node("If", ["choice"], ["y"], then_branch=branch, else_branch=branch),
        ],
        {"w0": -WEIGHT, "low": np.float32(0)},
    )
    plain = dense_model(model.SerializeToString())
    assert "Neg" not in names(plain)
    assert np.allclose(run(plain), X @ WEIGHT)


def test_a_bundles_graph_keeps_its_gate() -> None:
    model = make_model(classes=3)
    plain = onnx.load_model_from_string(dense_model(model.SerializeToString()))
    kept = {tensor.name for tensor in plain.graph.initializer}
    assert {"threshold", "gate_score", "conv.weight", "fc.weight"} <= kept
    assert [i.name for i in plain.graph.input] == ["input", "threshold"]
    assert [o.name for o in plain.graph.output] == [o.name for o in model.graph.output]
    found = weights(model.SerializeToString())
    assert {name: value.shape for name, value in found.items()} == {
        "conv.weight": (8, 1, 3, 3),
        "fc.weight": (4, 32),
    }


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(BundleError, match="not an ONNX file"):
        dense_model(b"\xff\xff nonsense")
