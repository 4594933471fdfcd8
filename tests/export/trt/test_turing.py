"""Products as 1x1 convolutions: the same numbers, and what is left alone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moon.export.session import run
from moon.export.trt.turing import linear_as_conv
from tests.export.trt.networks import model, node

_RNG = np.random.default_rng(0)


@given(
    trans=st.booleans(),
    alpha=st.sampled_from([1.0, 0.5, -2.0]),
    beta=st.sampled_from([1.0, 3.0]),
    bias=st.sampled_from([None, (4,), (1,), (1, 4)]),
)
@settings(max_examples=20, deadline=None)
def test_gemm(trans: bool, alpha: float, beta: float, bias: tuple[int, ...] | None) -> None:
    weight = _RNG.standard_normal((4, 6) if trans else (6, 4)).astype(np.float32)
    constants = {"w": weight}
    if bias is not None:
        constants["b"] = _RNG.standard_normal(bias).astype(np.float32)
    gemm = node("Gemm", ["input", *constants], "logits", transB=int(trans), alpha=alpha, beta=beta)
    graph = model([gemm], constants, shape=("N", 6))
    images = {"input": _RNG.standard_normal((5, 6)).astype(np.float32)}
    wanted = run(graph, images)["logits"]
    assert linear_as_conv(graph) == 1
    assert [n.op_type for n in graph.graph.node] == ["Unsqueeze", "Conv", "Squeeze"]
    np.testing.assert_allclose(run(graph, images)["logits"], wanted, rtol=1e-5, atol=1e-5)


def test_matmul() -> None:
    weight = _RNG.standard_normal((6, 4)).astype(np.float32)
    graph = model([node("MatMul", ["input", "w"], "logits")], {"w": weight}, shape=("N", 6))
    images = {"input": _RNG.standard_normal((5, 6)).astype(np.float32)}
    assert linear_as_conv(graph) == 1
    np.testing.assert_allclose(
        run(graph, images)["logits"], images["input"] @ weight, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "shape"),
    [
        ("MatMul", ["input", "w"], {}, ("N", 3, 6)),  # stacked
        ("MatMul", ["w", "input"], {}, (4, 6)),  # the constant is on the left
        ("Gemm", ["input", "w"], {"transA": 1}, (6, "N")),
        ("Gemm", ["input", "w", "rows"], {}, (5, 6)),  # another bias for each image
    ],
)
def test_other_products_stay(
    op: str, inputs: list[str], attributes: dict[str, Any], shape: tuple[str | int, ...]
) -> None:
    constants = {
        "w": _RNG.standard_normal((6, 4)).astype(np.float32),
        "rows": np.ones((5, 4), np.float32),
    }
    graph = model([node(op, inputs, "logits", **attributes)], constants, shape=shape)
    assert linear_as_conv(graph) == 0
    assert [n.op_type for n in graph.graph.node] == [op]


def test_half_products_stay() -> None:
    graph = model(
        [
            node("Cast", ["input"], "h", to=10),
            node("MatMul", ["h", "w"], "p"),
            node("Cast", ["p"], "logits", to=1),
        ],
        {"w": np.ones((6, 4), np.float16)},
        shape=("N", 6),
    )
    assert linear_as_conv(graph) == 0
