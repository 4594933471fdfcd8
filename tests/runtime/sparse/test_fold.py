from __future__ import annotations

import random
import resource
import time
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from moon.errors import BackendError
from moon.export.pack import pack
from moon.runtime.sparse.cut import cut
from moon.runtime.sparse.fold import FOLDED, fold
from moon.runtime.sparse.model import Model, read_model
from tests.bundles import make_model

Array = NDArray[Any]
DRAW = np.random.default_rng(7)


def reals(*shape: int, dtype: Any = np.float32) -> Array:
    """Of all sizes, with zeros of both signs, infinities and NaN."""
    values = DRAW.standard_normal(shape) * 10.0 ** DRAW.integers(-3, 4, shape)
    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0])
    return np.where(DRAW.random(shape) < 0.2, DRAW.choice(odd, shape), values).astype(dtype)


def positive(*shape: int, dtype: Any = np.float32) -> Array:
    return np.exp(DRAW.standard_normal(shape) * 3).astype(dtype)


def whole(*shape: int, dtype: Any = np.int64, low: int = -50, high: int = 50) -> Array:
    return DRAW.integers(low, high, shape).astype(dtype)


def bits(*shape: int) -> Array:
    return DRAW.random(shape) < 0.5


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def graph(op: str, inputs: list[Array | None], opset: int, **attributes: Any) -> ModelProto:
    names = ["" if value is None else f"i{index}" for index, value in enumerate(inputs)]
    node = helper.make_node(op, names, ["y"], **attributes)
    given = [
        numpy_helper.from_array(value, name)
        for name, value in zip(names, inputs, strict=True)
        if value is not None
    ]
    body = helper.make_graph([node], "g", [], [onnx.ValueInfoProto(name="y")], given)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def by_onnxruntime(model: bytes) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Its own folding would be compared otherwise, instead of its operators.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    return list(session.run(None, {}))


def folded(model: ModelProto) -> Array:
    result = fold(read_model(model.SerializeToString()))
    assert not result.nodes, "it was left in the graph"
    assert set(result.constants) == {"y"}
    values = result.constants["y"]
    assert values.flags.c_contiguous and not values.flags.writeable
    return values


def same_bits(left: Array, right: Array) -> None:
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    if left.dtype.kind == "f":
        # The sign and payload of a NaN are nobody's promise.
        gone = np.isnan(left)
        np.testing.assert_array_equal(gone, np.isnan(right))
        left, right = np.where(gone, 0, left), np.where(gone, 0, right)
        np.testing.assert_array_equal(np.signbit(left), np.signbit(right))
    np.testing.assert_array_equal(left, right)


F16, F64, I32, I8, U8 = np.float16, np.float64, np.int32, np.int8, np.uint8
ROWS = np.array([[0, 2, -1], [1, -3, 0]], np.int64)

CASES: list[tuple[str, list[Array | None], dict[str, Any]]] = [
    *[
        (op, [make(3, 4), make(4)], {})
        for op in ("Add", "Sub", "Mul", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual")
        for make in (reals, whole)
    ],
    *[
        (op, [reals(2, 1, 3, dtype=dtype), reals(5, 1, dtype=dtype)], {})
        for op in ("Add", "Sub", "Mul", "Div")
        for dtype in (np.float32, F64, F16)
    ],
    *[(op, [whole(7, dtype=I32), whole(1, dtype=I32)], {}) for op in ("Add", "Sub", "Mul")],
    ("Mul", [np.array([2**31 - 1, -(2**31)], I32), np.array([3, 3], I32)], {}),
    ("Add", [np.array(3, I32), np.array(2**31 - 1, I32)], {}),
    ("Add", [whole(4, 0), whole(1)], {}),
    *[
        ("Div", [whole(60, dtype=dtype), np.where(bits(60), 7, -3).astype(dtype)], {})
        for dtype in (np.int64, I32)
    ],
    ("Div", [np.float32([1, -1, 0, np.inf]), np.zeros(4, np.float32)], {}),
    *[
        (op, [whole(5, 1, dtype=U8, low=0, high=256), whole(1, 8, dtype=U8, low=0, high=256)], {})
        for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")
    ],
    ("BitwiseNot", [whole(9, dtype=I32)], {}),
    *[(op, [bits(4, 3), bits(3)], {}) for op in ("And", "Or", "Xor")],
    ("Equal", [bits(4, 3), bits(3)], {}),
    ("Not", [bits(5)], {}),
    *[(op, [reals(40)], {}) for op in ("Abs", "Ceil", "Floor", "IsNaN", "Neg", "Reciprocal")],
    *[(op, [whole(9, dtype=dtype)], {}) for op in ("Abs", "Neg") for dtype in (I32, np.int64)],
    ("Sqrt", [positive(50)], {}),
    ("Sqrt", [positive(50, dtype=F64)], {}),
    ("Sqrt", [np.float32([-1, -0.0, np.inf])], {}),
    ("Reciprocal", [reals(20, dtype=F64)], {}),
    *[
        (op, [make(3, 4), make(4), make(3, 1)], {})
        for op in ("Max", "Min")
        for make in (positive, whole)
    ],
    *[(op, [np.float32([1, np.nan, -2]), np.float32([np.nan, 3, 4])], {}) for op in ("Max", "Min")],
    ("Max", [reals(4)], {}),
    ("Pow", [reals(30), np.float32(2)], {}),
    ("Pow", [reals(30), np.array([3], np.float32)], {}),
    ("Pow", [whole(9, low=-9, high=9), ints(2)], {}),
    ("Pow", [whole(9, low=0, high=9, dtype=I32), np.arange(9, dtype=I32)], {}),
    *[
        ("Cast", [make], {"to": to})
        for make in (
            reals(40),
            reals(40, dtype=F64),
            reals(40, dtype=F16),
            whole(40),
            whole(40, dtype=I8),
            whole(40, dtype=U8, low=0, high=256),
            whole(40, dtype=I32),
            bits(40),
        )
        for to in (
            TensorProto.FLOAT,
            TensorProto.DOUBLE,
            TensorProto.FLOAT16,
            TensorProto.BOOL,
        )
    ],
    *[
        ("Cast", [make], {"to": to})
        for make in (
            positive(40, dtype=np.float32).clip(0, 250),
            np.float32([255.5, 0, -0.5, 7.9]),
            positive(40, dtype=F64).clip(0, 250),
            whole(40, dtype=U8, low=0, high=256),
            bits(40),
            whole(40, low=-(2**62), high=2**62),
            positive(20, dtype=F16).clip(0, 100),
        )
        for to in (TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.INT16)
        if not (make.dtype == np.int64 and to == TensorProto.DOUBLE)
    ],
    ("Cast", [np.array(2**40 + 2**16 + 1)], {"to": TensorProto.FLOAT16}),
    ("Cast", [np.float64([1 + 2**-11 + 2**-40, 65519.99, 65520])], {"to": TensorProto.FLOAT16}),
    *[
        ("CumSum", [values, axis], {"exclusive": exclusive, "reverse": reverse})
        for values in (
            whole(4, 5),
            whole(4, 5, dtype=I32),
            positive(4, 5) - 1,
            positive(4, 5, dtype=F64),
        )
        for axis in (np.array(0, I32), np.array(-1, np.int64), np.array([1], I32))
        for exclusive in (0, 1)
        for reverse in (0, 1)
    ],
    ("CumSum", [np.full(3, 2**31 - 1, I32), np.array(0, I32)], {}),
    ("CumSum", [whole(0, dtype=I32), np.array(0, I32)], {"exclusive": 1}),
    ("Where", [bits(3, 1), reals(4), reals(3, 4)], {}),
    ("Where", [bits(5), whole(5), ints(7)], {}),
    ("Concat", [reals(2, 3), reals(2, 1), reals(2, 0)], {"axis": -1}),
    ("Concat", [ints(1), ints(2, 3)], {"axis": 0}),
    ("ConstantOfShape", [ints(2, 3)], {}),
    ("ConstantOfShape", [ints()], {"value": numpy_helper.from_array(np.array([3], I32))}),
    ("ConstantOfShape", [ints(4, 0)], {"value": numpy_helper.from_array(np.array([True]))}),
    ("ConstantOfShape", [ints(2)], {"value": numpy_helper.from_array(np.float32([-0.0]))}),
    ("Expand", [reals(3, 1), ints(2, 1, 4)], {}),
    ("Expand", [reals(3, 1), ints(1)], {}),
    *[("Flatten", [reals(2, 3, 4)], {"axis": axis}) for axis in (0, 1, 2, 3, -1)],
    *[
        ("Gather", [reals(4, 3, 5), index], {"axis": axis})
        for index in (ROWS, np.array(-1, I32), whole(0))
        for axis in (0, 1, -1)
    ],
    ("GatherElements", [reals(4, 3, 5), whole(2, 3, 4, low=-4, high=4)], {"axis": 0}),
    ("GatherElements", [reals(4, 5), whole(4, 7, low=-5, high=5)], {"axis": -1}),
    ("Identity", [reals(3)], {}),
    ("Range", [np.array(3), np.array(-8), np.array(-3)], {}),
    ("Range", [np.array(3, I32), np.array(3, I32), np.array(2, I32)], {}),
    ("Reshape", [reals(2, 3, 4), ints(0, -1)], {}),
    ("Reshape", [reals(2, 3, 4), ints(4, 3, 2)], {}),
    ("Reshape", [reals(0, 3), ints(3, 0)], {"allowzero": 1}),
    ("Reshape", [reals(1), ints()], {}),
    *[
        ("ScatterElements", [reals(size), whole(9, low=-size, high=size), reals(9)], {"axis": 0})
        for size in (5, 40)
    ],
    *[
        (
            "ScatterElements",
            [reals(4, 5), whole(2, 3, low=-4, high=4, dtype=I32), reals(2, 3)],
            {"axis": axis},
        )
        for axis in (0, 1)
    ],
    ("Shape", [reals(2, 0, 4)], {}),
    ("Shape", [reals(2, 3, 4)], {"start": -2, "end": 9}),
    ("Shape", [reals(2, 3, 4)], {"start": 2, "end": 1}),
    ("Size", [reals(2, 3, 4)], {}),
    *[
        ("Slice", [reals(5, 6), ints(start), ints(end), ints(axis), ints(step)], {})
        for start, end in ((0, 3), (-4, 99), (4, 1), (99, -99), (-99, 99), (-1, 0), (5, 5))
        for axis in (0, -1)
        for step in (1, 2, -1, -3)
    ],
    ("Slice", [reals(5, 6), ints(1, 2), ints(4, 2**62)], {}),
    ("Slice", [reals(0, 6), ints(0), ints(4), ints(0), ints(-1)], {}),
    ("Slice", [reals(5, 6), ints(1), ints(4), None, ints(2)], {}),
    ("Squeeze", [reals(1, 3, 1), ints(0, -1)], {}),
    ("Squeeze", [reals(1, 1)], {}),
    ("Tile", [reals(2, 3), ints(2, 0)], {}),
    ("Tile", [reals(2, 3), ints(1, 3)], {}),
    ("Transpose", [reals(2, 3, 4)], {}),
    ("Transpose", [reals(2, 3, 4)], {"perm": [1, 2, 0]}),
    ("Unsqueeze", [reals(2, 3), ints(-1, 1)], {}),
    ("Unsqueeze", [np.float32(3), ints(0)], {}),
]


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    CASES,
    ids=[f"{op}-{index}" for index, (op, _, _) in enumerate(CASES)],
)
def test_operators_agree_with_onnxruntime(
    op: str, inputs: list[Array | None], attributes: dict[str, Any]
) -> None:
    model = graph(op, inputs, 18, **attributes)
    (wanted,) = by_onnxruntime(model.SerializeToString())
    same_bits(folded(model), np.asarray(wanted))


@pytest.mark.parametrize("op", ["Exp", "Log", "Pow"])
@pytest.mark.parametrize("dtype", [np.float32, F64])
def test_operators_that_are_rounded(op: str, dtype: Any) -> None:
    inputs: list[Array | None] = [positive(300, dtype=dtype).clip(1e-2, 10)]
    if op == "Pow":
        inputs.append((DRAW.standard_normal(300) * 2).astype(dtype))
    model = graph(op, inputs, 18)
    (wanted,) = by_onnxruntime(model.SerializeToString())
    np.testing.assert_array_max_ulp(folded(model), np.asarray(wanted), maxulp=2)
    if dtype == np.float32:
        # ONNX Runtime has no such kernels for float16; these are the nearest values.
        halves = [np.asarray(value).astype(F16) for value in inputs]
        halves[0] = halves[0].clip(0.1, 5)
        wide = [value.astype(np.float32) for value in halves]
        found, close = folded(graph(op, [*halves], 18)), folded(graph(op, [*wide], 18))
        np.testing.assert_array_max_ulp(found, close.astype(F16), maxulp=1)


def test_every_operator_is_tested() -> None:
    assert {op for op, _, _ in CASES} | {"Exp", "Log"} == FOLDED


OLDER: list[tuple[str, list[Array | None], int, dict[str, Any]]] = [
    ("Slice", [reals(5, 6)], 9, {"starts": [1, -2], "ends": [4, 99]}),
    ("Slice", [reals(5, 6)], 9, {"starts": [1], "ends": [-1], "axes": [1]}),
    ("Unsqueeze", [reals(5, 6)], 11, {"axes": [0, 2]}),
    ("Squeeze", [reals(5, 1, 6, 1)], 11, {"axes": [-1]}),
    ("Squeeze", [reals(5, 1)], 12, {}),
    ("Shape", [reals(5, 1)], 12, {}),
]


@pytest.mark.parametrize(("op", "inputs", "opset", "attributes"), OLDER)
def test_older_forms_of_operators(
    op: str, inputs: list[Array | None], opset: int, attributes: dict[str, Any]
) -> None:
    model = graph(op, inputs, opset, **attributes)
    (wanted,) = by_onnxruntime(model.SerializeToString())
    same_bits(folded(model), np.asarray(wanted))


LEFT: list[tuple[str, list[Array | None], dict[str, Any]]] = [
    ("Div", [ints(3), ints(0)], {}),
    ("Div", [ints(-(2**63)), ints(-1)], {}),
    ("Cast", [np.float32([np.nan])], {"to": TensorProto.INT32}),
    ("Cast", [np.float32([2.0**31])], {"to": TensorProto.INT32}),
    ("Cast", [np.float32([-1])], {"to": TensorProto.UINT8}),
    ("Cast", [np.float32([1])], {"to": TensorProto.BFLOAT16}),
    ("Cast", [np.float32([1])], {"to": TensorProto.STRING}),
    ("Pow", [ints(10), ints(17)], {}),
    ("Add", [reals(3), reals(4)], {}),
    ("Add", [reals(3), reals(3, dtype=F64)], {}),
    ("Add", [reals(3)], {}),
    ("Add", [reals(3), None], {}),
    ("Add", [reals(3), reals(3)], {"odd": 1}),
    ("Reshape", [reals(3), ints(-1, -1)], {}),
    ("Reshape", [reals(3), ints(1, 1, 1, 0)], {}),
    ("Gather", [reals(3), ints(3)], {}),
    ("ScatterElements", [reals(3), ints(3), reals(1)], {}),
    ("ScatterElements", [reals(3), ints(-4), reals(1)], {}),
    ("ScatterElements", [reals(3), ints(1), reals(1)], {"reduction": "add"}),
    ("Slice", [reals(3), ints(0), ints(1), ints(0), ints(0)], {}),
    ("Slice", [reals(3), ints(0), ints(1), ints(4)], {}),
    ("ConstantOfShape", [ints(-1)], {}),
    ("ConstantOfShape", [ints(*range(100))], {}),
    ("Transpose", [reals(3, 2)], {"perm": [0, 0]}),
    ("Squeeze", [reals(3, 2), ints(0)], {}),
    ("Unsqueeze", [reals(3, 2), ints(1, 1)], {}),
    ("CumSum", [ints(1), ints(3)], {}),
    ("Concat", [reals(3, 1), reals(2, 2)], {"axis": 1}),
    ("Tile", [reals(3), ints(-1)], {}),
    ("Range", [ints(1), ints(2), ints(0)], {}),
    ("Range", [np.float32(0), np.float32(1), np.float32(0.1)], {}),
    ("Erf", [reals(3)], {}),
    ("RandomNormal", [], {"shape": [2]}),
]


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"), LEFT, ids=[f"{op}-{i}" for i, (op, _, _) in enumerate(LEFT)]
)
def test_what_is_malformed_undefined_or_unknown_stays(
    op: str, inputs: list[Array | None], attributes: dict[str, Any]
) -> None:
    model = read_model(graph(op, inputs, 18, **attributes).SerializeToString())
    result = fold(model)
    assert [node.op_type for node in result.nodes] == [op]
    assert result.constants.keys() == model.constants.keys()


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("ConstantOfShape", [ints(1 << 20, 1 << 20)], {}),
        ("ConstantOfShape", [ints(0, 1 << 62)], {}),
        ("Expand", [reals(1), ints(1 << 30)], {}),
        ("ConstantOfShape", [ints(1 << 27)], {}),
        ("Tile", [reals(1024), ints(1 << 40)], {}),
        ("Range", [np.array(0), np.array(1 << 60), np.array(1)], {}),
        ("Gather", [reals(2, 1 << 15), np.zeros(1 << 15, np.int64)], {}),
        ("Add", [reals(1 << 15, 1), reals(1, 1 << 15)], {}),
        ("Where", [bits(1 << 15, 1), reals(1, 1 << 15), reals(1)], {}),
        ("Max", [reals(1 << 15, 1), reals(1, 1 << 15)], {}),
    ],
)
def test_small_files_cannot_ask_for_gigabytes(
    op: str, inputs: list[Array | None], attributes: dict[str, Any]
) -> None:
    model = read_model(graph(op, inputs, 18, **attributes).SerializeToString())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BackendError, match="more than a file of its size"):
        fold(model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_many_zeros_together_are_too_much() -> None:
    shape = numpy_helper.from_array(ints(1 << 23), "shape")
    nodes = [helper.make_node("ConstantOfShape", ["shape"], [f"z{i}"]) for i in range(9)]
    nodes.append(helper.make_node("Odd", [f"z{i}" for i in range(9)], ["y"]))
    body = helper.make_graph(nodes, "g", [], [onnx.ValueInfoProto(name="y")], [shape])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(BackendError, match="more than a file of its size"):
        fold(read_model(model.SerializeToString()))


def test_an_input_that_may_be_fed_is_no_constant() -> None:
    model = read_model(make_model(classes=3).SerializeToString())
    result = fold(model)
    assert result.optional == {"threshold"}
    assert "threshold" in result.constants
    readers = [node for node in result.nodes if "threshold" in node.inputs]
    assert readers == [node for node in model.nodes if "threshold" in node.inputs]
    assert readers


def test_what_subgraphs_read_is_kept() -> None:
    value = onnx.ValueInfoProto(name="t")
    branches = {
        f"{which}_branch": helper.make_graph([helper.make_node(op, ["c"], ["t"])], op, [], [value])
        for which, op in (("then", "Neg"), ("else", "Abs"))
    }
    nodes = [
        helper.make_node("Neg", ["w"], ["c"]),
        helper.make_node("If", ["yes"], ["y"], **branches),
    ]
    given = [numpy_helper.from_array(np.float32([1, 2]), "w"), numpy_helper.from_array(bits(), "u")]
    yes = helper.make_tensor_value_info("yes", TensorProto.BOOL, [])
    body = helper.make_graph(nodes, "g", [yes], [onnx.ValueInfoProto(name="y")], given)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    result = fold(read_model(model.SerializeToString()))
    assert [node.op_type for node in result.nodes] == ["If"]
    assert {name: values.tolist() for name, values in result.constants.items()} == {"c": [-1, -2]}


def test_bfloat16_is_only_cast() -> None:
    held = numpy_helper.from_array(np.float32([1.5, 2]).astype(helper.tensor_dtype_to_np_dtype(16)))
    held.name = "w"
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["w", "w"], ["s"]),
    ]
    outputs = [onnx.ValueInfoProto(name="f"), onnx.ValueInfoProto(name="s")]
    body = helper.make_graph(nodes, "g", [], outputs, [held])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    result = fold(read_model(model.SerializeToString()))
    assert [node.op_type for node in result.nodes] == ["Add"]
    assert result.constants["f"].tolist() == [1.5, 2]
    assert result.bfloat16 == {"w"}


def network(density: float, weight_type: Any = np.float32) -> ModelProto:
    """Three layers of weights, of densities around the one given."""
    nodes, given, last = [], [], "x"
    for index, shape in enumerate([(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 1, 1), (10, 64)]):
        weight = DRAW.standard_normal(shape) * (DRAW.random(shape) < density)
        given.append(numpy_helper.from_array(weight.astype(weight_type), f"w{index}"))
        if index < 3:
            nodes.append(helper.make_node("Conv", [last, f"w{index}"], [f"c{index}"]))
        else:
            nodes.append(helper.make_node("ReduceMean", [last, "axes"], ["m"], keepdims=0))
            nodes.append(helper.make_node("Gemm", ["m", f"w{index}"], [f"c{index}"], transB=1))
        last = f"c{index}"
    given.append(numpy_helper.from_array(ints(2, 3), "axes"))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(weight_type))
    x = helper.make_tensor_value_info("x", kind, ["N", 3, 12, 12])
    y = helper.make_tensor_value_info(last, kind, ["N", 10])
    body = helper.make_graph(nodes, "g", [x], [y], given)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def weights_by_onnxruntime(model: Model, names: list[str]) -> dict[str, Array]:
    ends = next(i for i, node in enumerate(model.nodes) if node.op_type == "Conv")
    part = cut(model, [], names, model.nodes[:ends])
    return dict(zip(names, by_onnxruntime(part), strict=True))


@pytest.mark.parametrize("weights", ["dense", "compact", "coo"])
@pytest.mark.parametrize("values", ["fp32", "fp16"])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, F16])
def test_packed_weights_are_those_of_onnxruntime(
    weights: Any, values: Any, density: float, dtype: Any
) -> None:
    plain = network(density, dtype)
    packed = read_model(pack(plain, weights=weights, values=values).SerializeToString())
    result = fold(packed)
    kept = [node.op_type for node in result.nodes]
    assert kept == ["Conv", "Conv", "Conv", "ReduceMean", "Gemm"]
    names = [f"w{index}" for index in range(4)]
    assert set(result.constants) == {*names, "axes"}
    for name, wanted in weights_by_onnxruntime(packed, names).items():
        found = result.constants[name]
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.tobytes() == wanted.tobytes()
    dense = read_model(plain.SerializeToString()).constants
    for name in names:
        exact = dense[name].astype(F16).astype(dtype) if values == "fp16" else dense[name]
        np.testing.assert_array_equal(result.constants[name], exact)


def test_damaged_models_are_folded_and_cut_or_refused() -> None:
    draw = random.Random(2)
    whole = [
        pack(network(0.1), weights="compact").SerializeToString(),
        make_model(classes=3).SerializeToString(),
    ]
    done = 0
    for index in range(1500):
        data = bytearray(whole[index % 2])
        # Most bytes are weights; what follows a name is more telling.
        at = draw.choice(
            [draw.randrange(len(data)), data.rfind(b"w", 0, draw.randrange(len(data)))]
        )
        data[(at + draw.randrange(12)) % len(data)] = draw.randrange(256)
        try:
            model = fold(read_model(bytes(data)))
            cut(model, model.inputs, [value.name for value in model.outputs], model.nodes)
            done += 1
        except BackendError:
            continue
    assert 100 < done < 1500


def test_folding_is_quick() -> None:
    shape = (512, 512, 3, 3)
    given = DRAW.standard_normal(shape, np.float32) * (DRAW.random(shape) < 0.2)
    weight = numpy_helper.from_array(given.astype(np.float32), "w0")
    model = network(0.5)
    model.graph.initializer[0].CopyFrom(weight)
    packed = pack(model, weights="compact").SerializeToString()
    started = time.process_time()
    fold(read_model(packed))
    # 2.4 million weights; a tenth of this on one core.
    assert time.process_time() - started < 0.6
