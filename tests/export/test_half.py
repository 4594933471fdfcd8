from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from moon.errors import ExportError
from moon.export.graph import initializers, weight_names
from moon.export.half import to_half
from moon.export.pack import round_values
from moon.export.session import check_survives, run


@pytest.fixture
def rounded(body: ModelProto) -> ModelProto:
    return round_values(body, "fp16")


def test_layers_are_fp16_and_the_ends_and_the_classifier_are_not(rounded: ModelProto) -> None:
    half = to_half(rounded)
    onnx.checker.check_model(half, full_check=True)
    kinds = {name: tensor.data_type for name, tensor in initializers(half).items()}
    assert kinds["head.weight"] == kinds["head.bias"] == TensorProto.FLOAT
    convs = [node.input[1] for node in half.graph.node if node.op_type == "Conv"]
    assert len(convs) == len(weight_names(rounded)) - 1
    assert {kinds[name] for name in convs} == {TensorProto.FLOAT16}
    ends = (half.graph.input[0], half.graph.output[0])
    assert [value.type.tensor_type.elem_type for value in ends] == [TensorProto.FLOAT] * 2
    assert [value.name for value in ends] == ["input", "logits"]


def test_answers_stay_close(rounded: ModelProto) -> None:
    images = np.random.default_rng(0).standard_normal((7, 1, 8, 8)).astype(np.float32)
    wide, half = (run(m, {"input": images})["logits"] for m in (rounded, to_half(rounded)))
    assert 0 < np.abs(wide - half).max() < 2e-2


def test_the_graph_given_is_left_alone(rounded: ModelProto) -> None:
    before = rounded.SerializeToString()
    to_half(rounded)
    assert rounded.SerializeToString() == before


def test_without_a_last_linear_layer_the_logits_are_cast() -> None:
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["input"], ["f"]), helper.make_node("Neg", ["f"], ["logits"])],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 1, 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
    )
    body = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    half = to_half(body)
    onnx.checker.check_model(half, full_check=True)
    logits = run(half, {"input": np.float32([[1, 2, 0.1]])[:, :, None, None]})["logits"]
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, -np.float32(np.float16([[1, 2, 0.1]])))


def test_a_graph_that_does_not_load_is_refused_from_outside(rounded: ModelProto) -> None:
    check_survives(rounded)
    rounded.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ExportError, match=r"ONNX Runtime fails on loading.*NoSuchOperator"):
        check_survives(rounded)
