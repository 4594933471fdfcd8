from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from moon.errors import BundleError
from moon.export.pack import pack
from moon.export.trt.sparsity import LayerVerdict, lint, verdict


def two_of_four(*shape: int) -> NDArray[np.float32]:
    """[K, C, ...] with exactly two nonzeros in each four input channels, at random places."""
    rng = np.random.default_rng(0)
    rows, channels, *kernel = shape
    ranks = rng.random((rows, channels // 4, 4, *kernel)).argsort(axis=2)
    values = rng.uniform(0.5, 1, ranks.shape) * (ranks < 2)
    return values.reshape(shape).astype(np.float32)


def model(nodes: list[NodeProto], tensors: dict[str, NDArray[Any]]) -> Any:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def judge(op: str, weight: NDArray[Any], *, left: bool = False, **attributes: Any) -> LayerVerdict:
    """The verdict on a graph of one node."""
    inputs = ["w", "x"] if left else ["x", "w"]
    node = helper.make_node(op, inputs, ["y"], name="layer", **attributes)
    found = lint(model([node], {"w": weight}).SerializeToString())
    assert len(found) == 1
    return found[0]


def eligible_by_definition(weight: NDArray[Any]) -> bool:
    """TensorRT's own words for it, element by element."""
    rows, channels, height, width = weight.shape
    if channels % 4:
        return False
    return all(
        np.count_nonzero(weight[k, c : c + 4, r, s]) <= 2
        for k in range(rows)
        for c in range(0, channels, 4)
        for r in range(height)
        for s in range(width)
    )


def test_a_wide_layer_that_keeps_the_rule_is_worth_it() -> None:
    found = judge("Conv", two_of_four(256, 256, 1, 1))
    assert (found.name, found.op, found.weight, found.shape) == (
        "layer",
        "Conv",
        "w",
        (256, 256, 1, 1),
    )
    assert found.eligible and found.worth and found.nonzeros == 256 * 128
    assert found.why == "at most two nonzeros in every four input channels"


def test_a_narrow_layer_is_eligible_and_not_worth_it() -> None:
    for shape in ((256, 64, 3, 3), (64, 256, 3, 3)):
        found = judge("Conv", two_of_four(*shape))
        assert found.eligible and not found.worth
        assert f"{shape[1]} channels in and {shape[0]} out" in found.why


def test_one_group_with_a_third_nonzero_breaks_the_rule() -> None:
    weight = two_of_four(8, 8, 3, 3)
    group = weight[5, 4:8, 2, 1]
    group[np.flatnonzero(group == 0)[0]] = 1
    found = judge("Conv", weight)
    assert not found.eligible
    assert "1 of 144 groups of four input channels have more than two nonzeros" in found.why


def test_groups_of_four_begin_at_multiples_of_four() -> None:
    """Four in a row across two groups are no group."""
    weight = np.zeros((1, 8, 1, 1), np.float32)
    weight[0, 2:6] = 1
    assert judge("Conv", weight).eligible
    weight[0, :, 0, 0] = [0, 1, 1, 1, 0, 0, 0, 0]
    assert not judge("Conv", weight).eligible


def test_groups_run_along_input_channels_and_no_other_axis() -> None:
    weight = np.zeros((8, 8, 4, 4), np.float32)
    weight[:, ::4] = 1
    weight[:, 1::4] = 1
    assert judge("Conv", weight).eligible
    assert not judge("Conv", np.ascontiguousarray(weight.swapaxes(1, 2).repeat(2, 1))).eligible


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.floats(0, 0.9), st.integers(0, 9)
)
def test_the_rule_is_tensorrts(k: int, c: int, r: int, zeros: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0.5, 1, (k, c, r, 2)).astype(np.float32)
    weight[rng.random(weight.shape) < zeros] = 0
    assert judge("Conv", weight).eligible == eligible_by_definition(weight)


@pytest.mark.parametrize(
    ("op", "shape", "attributes", "why"),
    [
        ("Conv", (32, 3, 3, 3), {}, "3 input channels, not a multiple of four"),
        ("Conv", (32, 1, 3, 3), {}, "1 input channel, not"),
        ("Conv", (32, 8, 3, 3), {"group": 4}, "a convolution in 4 groups"),
        ("ConvTranspose", (8, 8, 3, 3), {}, "transposed convolutions"),
        ("MatMul", (5, 8, 8), {}, "a product of stacked matrices"),
    ],
)
def test_what_the_layer_itself_forbids(
    op: str, shape: tuple[int, ...], attributes: dict[str, Any], why: str
) -> None:
    found = judge(op, np.zeros(shape, np.float32), **attributes)
    assert not found.eligible and why in found.why


def test_a_layer_without_zeros_is_called_dense() -> None:
    assert judge("Conv", np.ones((8, 8, 1, 1), np.float32)).why == "dense: no weight is zero"


def test_linear_layers_are_grouped_along_their_inputs() -> None:
    rows = two_of_four(6, 8)
    assert judge("Gemm", rows, transB=1).eligible
    assert judge("Gemm", np.ascontiguousarray(rows.T)).eligible
    assert judge("MatMul", np.ascontiguousarray(rows.T)).eligible
    columns = np.zeros((8, 8), np.float32)
    columns[:2] = 1
    assert judge("MatMul", columns).eligible
    assert not judge("Gemm", columns, transB=1).eligible
    assert "left factor" in judge("MatMul", rows, left=True).why


def network() -> Any:
    """Two 2:4 convolutions (one wide), a dense one, and a product of the score head."""
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["a"], name="stem"),
        helper.make_node("Conv", ["a", "narrow"], ["b"], name="n"),
        helper.make_node("Conv", ["b", "wide"], ["c"], name=""),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "head/knn/bank"], ["y"]),
    ]
    rng = np.random.default_rng(1)
    return model(
        nodes,
        {
            "stem": rng.uniform(0.5, 1, (64, 3, 3, 3)).astype(np.float32),
            "narrow": two_of_four(256, 64, 3, 3),
            "wide": two_of_four(256, 256, 3, 3),
            "head/knn/bank": np.zeros((256, 4), np.float32),
        },
    )


@pytest.mark.parametrize("weights", ["dense", "compact", "coo"])
@pytest.mark.parametrize("values", ["fp32", "fp16"])
def test_packed_weights_are_judged_as_plain_ones(weights: Any, values: Any) -> None:
    plain = lint(network().SerializeToString())
    packed = lint(pack(network(), weights=weights, values=values).SerializeToString())
    assert packed == plain
    assert [(one.name, one.eligible, one.worth) for one in plain] == [
        ("stem", False, False), ("n", True, False), ("c", True, True)
    ]  # fmt: skip


def test_the_verdict_promises_no_more_than_is_there() -> None:
    stem, narrow, wide = lint(network().SerializeToString())
    loose = judge("Conv", np.eye(8, dtype=np.float32).repeat(3, 1)[:, :, None, None])
    assert "nothing for 2:4" in verdict([])
    assert "as the dense model it is" in verdict([stem])
    assert "None of 2 layers keeps the 2:4 rule" in verdict([stem, loose])
    assert "smaller and not faster" in verdict([loose])
    assert "1 of 2 layers can use 2:4 kernels, but none has 256" in verdict([stem, narrow])
    assert "expect no gain" in verdict([narrow])
    line = verdict([stem, narrow, wide])
    assert line.startswith("2 of 3 layers can use 2:4 kernels, and 1, with 80% of the weights, is")
    assert "0 to 15%" in line and "\n" not in line


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(BundleError, match="not an ONNX file"):
        lint(b"\xff\xff")
