from __future__ import annotations

import resource
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from moon.errors import BackendError
from moon.runtime.sparse.cut import cut
from moon.runtime.sparse.fold import fold
from moon.runtime.sparse.model import Model, Value, read_model
from tests.bundles import make_model

F32 = np.dtype(np.float32)
DRAW = np.random.default_rng(3)


def run(model: bytes, outputs: list[str], **feeds: NDArray[Any]) -> list[Any]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return list(session.run(outputs, feeds))


def bundle() -> tuple[ModelProto, Model]:
    proto = make_model(classes=3)
    return proto, read_model(proto.SerializeToString())


def images(proto: ModelProto, count: int) -> NDArray[np.float32]:
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    shape = (count, *(dim.dim_value for dim in dims[1:]))
    return DRAW.random(shape, np.float32)


def test_the_whole_model_again() -> None:
    proto, model = bundle()
    names = [value.name for value in model.outputs]
    threshold = Value("threshold", F32, ())
    part = cut(model, [*model.inputs, threshold], names, model.nodes)
    onnx.checker.check_model(onnx.load_from_string(part), full_check=True)
    data = images(proto, 5)
    for feeds in ({}, {"threshold": np.array(0.5, np.float32)}):
        wanted = run(proto.SerializeToString(), names, input=data, **feeds)
        for left, right in zip(run(part, names, input=data, **feeds), wanted, strict=True):
            np.testing.assert_array_equal(left, right)
    again = read_model(part)
    assert (again.opset, again.ir_version) == (model.opset, model.ir_version)
    assert again.optional == {"threshold"}
    assert [node.raw for node in again.nodes] == [node.raw for node in model.nodes]


def test_every_cut_in_two_gives_the_same_outputs() -> None:
    proto, model = bundle()
    model = fold(model)
    names = [value.name for value in model.outputs]
    data = images(proto, 4)
    wanted = run(proto.SerializeToString(), names, input=data)
    for at in range(1, len(model.nodes)):
        first, second = model.nodes[:at], model.nodes[at:]
        made = {name for node in first for name in node.outputs}
        crossing = sorted({n for node in second for n in node.inputs} & made)
        there = [name for name in names if name in made]
        kept = [*dict.fromkeys([*crossing, *there])]
        values = run(cut(model, model.inputs, kept, first), kept, input=data)
        held = dict(zip(kept, values, strict=True))
        inputs = [Value(n, held[n].dtype, (None,) * held[n].ndim) for n in crossing]
        uses = {name for node in second for name in node.inputs}
        inputs += [value for value in model.inputs if value.name in uses]
        feeds = {n: held[n] for n in crossing} | {v.name: data for v in inputs if v.name == "input"}
        rest = [name for name in names if name not in made]
        held |= dict(zip(rest, run(cut(model, inputs, rest, second), rest, **feeds), strict=True))
        for name, value in zip(names, wanted, strict=True):
            np.testing.assert_array_equal(held[name], value)


def test_only_the_constants_that_are_needed() -> None:
    _, model = bundle()
    last = model.nodes[-1]
    inputs = [Value(n, F32, None) for n in last.inputs if n not in model.constants]
    again = read_model(cut(model, inputs, last.outputs[:1], [last]))
    assert set(again.constants) <= set(last.inputs)


def test_an_optional_input_not_asked_for_is_a_plain_constant() -> None:
    _, model = bundle()
    reader = next(node for node in model.nodes if "threshold" in node.inputs)
    inputs = [Value(n, F32, None) for n in reader.inputs if n not in model.constants]
    again = read_model(cut(model, inputs, reader.outputs, [reader]))
    assert "threshold" in again.constants and not again.optional


def test_constants_and_inputs_can_be_outputs() -> None:
    _, model = bundle()
    value = Value("input", F32, ("N", None))
    data = np.float32([[1, 2]])
    part = cut(model, [value], ["input", "threshold"], [])
    assert run(part, ["input", "threshold"], input=data)[0].tolist() == [[1, 2]]
    assert run(part, ["threshold"], input=data)[0] == model.constants["threshold"]


TYPES = [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 16]


@pytest.mark.parametrize("kind", TYPES, ids=TensorProto.DataType.Name)
@pytest.mark.parametrize("shape", [(), (0, 2), (3, 2)])
def test_constants_of_every_type(kind: int, shape: tuple[int, ...]) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    values = (np.arange(int(np.prod(shape))) + 1).reshape(shape).astype(dtype)
    tensor = numpy_helper.from_array(values, "w")
    node = helper.make_node("Identity", ["w"], ["y"])
    body = helper.make_graph([node], "g", [], [onnx.ValueInfoProto(name="y")], [tensor])
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    model = read_model(proto.SerializeToString())
    again = onnx.load_from_string(cut(model, [], ["y"], model.nodes)).graph.initializer[0]
    assert (again.data_type, tuple(again.dims), again.raw_data) == (kind, shape, values.tobytes())


def branching() -> ModelProto:
    value = onnx.ValueInfoProto(name="t")
    then = helper.make_graph([helper.make_node("Add", ["s", "c"], ["t"])], "a", [], [value])
    other = helper.make_graph([helper.make_node("Neg", ["s"], ["t"])], "b", [], [value])
    nodes = [
        helper.make_node("Relu", ["x"], ["s"]),
        helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"]),
        helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])]
    given = [numpy_helper.from_array(np.float32([5]), "c")]
    body = helper.make_graph(nodes, "g", inputs, outputs, given)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_constants_of_subgraphs_come_along() -> None:
    model = read_model(branching().SerializeToString())
    inputs = [Value("s", F32, ("N",)), Value("yes", np.dtype(np.bool_), ())]
    part = cut(model, inputs, ["y"], model.nodes[1:])
    assert run(part, ["y"], s=np.float32([1]), yes=np.array(True))[0].tolist() == [6]


def test_further_domains_and_old_formats() -> None:
    node = helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    body = helper.make_graph([node], "g", [x], [onnx.ValueInfoProto(name="y")])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(body, opset_imports=opsets, ir_version=3)
    model = read_model(proto.SerializeToString())
    part = cut(model, model.inputs, ["y"], model.nodes)
    assert read_model(part).domains == {"com.microsoft": 1}
    # Before version 4 constants would have to be inputs.
    assert read_model(part).ir_version == 4
    assert run(part, ["y"], x=np.float32([0, 1]))[0][0] == 0


def test_refusals() -> None:
    _, model = bundle()
    with pytest.raises(BackendError, match=r"needs input, which is not in this part"):
        cut(model, [], [model.nodes[0].outputs[0]], model.nodes[:1])
    with pytest.raises(BackendError, match="an output needs nowhere"):
        cut(model, model.inputs, ["nowhere"], model.nodes)
    with pytest.raises(BackendError, match="of the type None"):
        cut(model, [Value("input", None, None)], ["input"], [])
    huge = np.broadcast_to(np.float32(0), (1 << 29,))
    large = Model((), {"a": huge[: 1 << 28], "b": huge[: 1 << 28]}, (), (), 18, 10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BackendError, match="2 GiB"):
        cut(large, [], ["a", "b"], [])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
