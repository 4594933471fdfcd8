from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from moon.errors import ExportError, ParityError
from moon.export.checks import (
    check_onnx,
    check_scores,
    check_zeros,
    compare,
    require,
)
from moon.export.classifier import classifier_weights
from moon.export.graph import array, copied, initializers, set_initializer
from moon.export.head import add_head
from moon.scores import Training, fit_score
from moon.trainer.checkpoint import Checkpoint

LOGITS = np.array([[1, 2, 0], [3, -1, 0]], np.float32)


def test_comparison_by_hand() -> None:
    other = LOGITS + np.array([[0, -1.5, 0], [0, 0, 0.25]], np.float32)
    parity = compare(LOGITS, other)
    assert (parity.images, parity.max_abs, parity.top1_agreement) == (2, 1.5, 0.5)


def test_a_difference_beyond_the_tolerance_is_refused_with_figures() -> None:
    require(LOGITS, LOGITS + np.float32(9e-5), "fp32", "it")
    with pytest.raises(ParityError, match=r"it differs by 0\.0002 .*more than 0\.0001, over 2"):
        require(LOGITS, LOGITS + np.float32(2e-4), "fp32", "it")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    other = LOGITS.copy()
    other[1, 2] = bad
    with pytest.raises(ParityError, match="graph gives NaN or infinite logits for 1 of 2 images"):
        compare(LOGITS, other)
    with pytest.raises(ParityError, match="the model gives NaN"):
        compare(other, LOGITS)
    with pytest.raises(ParityError, match="shape"):
        compare(LOGITS, LOGITS[:1])


def test_a_masked_weight_that_came_to_life_is_noticed(
    checkpoint: Checkpoint, body: ModelProto
) -> None:
    body = copied(body)
    masks = {name: mask.numpy() for name, mask in checkpoint.masks.items()}
    check_zeros(masks, body)
    name, mask = next((n, m) for n, m in masks.items() if not m.all())
    weight = array(initializers(body)[name])
    weight[np.unravel_index(np.flatnonzero(~mask)[0], mask.shape)] = 1e-30
    set_initializer(body, name, weight)
    with pytest.raises(ExportError, match=f"1 masked weights of {name} are not zero"):
        check_zeros(masks, body)
    with pytest.raises(ExportError, match="layer gone is not among the weights"):
        check_zeros({"gone": np.ones((2, 2), bool)}, body)


def linear(weight: NDArray[np.float32]) -> ModelProto:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "val_3"], ["logits"])],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", weight.shape[0]])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", weight.shape[1]])],
        [numpy_helper.from_array(weight, "val_3")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_a_transposed_weight_under_another_name_is_found() -> None:
    mask = np.array([[True, False, True], [False, False, True]])
    check_zeros({"fc.weight": mask}, linear(np.ascontiguousarray(mask.T.astype(np.float32))))
    with pytest.raises(ExportError, match="not among the weights"):
        check_zeros({"fc.weight": mask}, linear(np.ones((3, 2), np.float32)))


def test_the_onnx_checker_is_asked() -> None:
    graph = linear(np.ones((3, 2), np.float32))
    check_onnx(graph)
    graph.graph.node[0].op_type = "MadUp"
    with pytest.raises(ExportError, match="the ONNX checker refuses the graph"):
        check_onnx(graph)


@pytest.mark.parametrize("times", [1.001, float("nan")])
def test_a_score_that_is_not_its_definition_is_refused(body: ModelProto, times: float) -> None:
    weight, bias = classifier_weights(body) or (None, None)
    gen = fit_score("gen", Training(weight=weight, bias=bias, unknown_index=10))
    model = add_head(body, outputs=11, unknown_index=10, fitted=[gen])
    items = np.random.default_rng(0).standard_normal((6, 1, 8, 8), dtype=np.float32)
    assert check_scores(model, [], items) == {}
    assert check_scores(model, [gen], items)["gen"] < 1e-5
    gamma = next(t for t in model.graph.initializer if t.name == "head/gen/gamma")
    gamma.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(gamma) * times, gamma.name))
    with pytest.raises(ParityError, match="the score gen of the graph differs"):
        check_scores(model, [gen], items)
