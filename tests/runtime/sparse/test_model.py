from __future__ import annotations

import random
import resource
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import (
    AttributeProto,
    ModelProto,
    SparseTensorProto,
    TensorProto,
    helper,
    numpy_helper,
)

from moon.errors import BackendError
from moon.runtime.sparse.model import Model, Value, read_model
from moon.wire import bytes_field, varint_field
from tests.bundles import make_model


def model_of(
    nodes: list[onnx.NodeProto],
    *,
    initializers: tuple[TensorProto, ...] = (),
    sparse: tuple[SparseTensorProto, ...] = (),
    outputs: tuple[str, ...] = ("y",),
    ir_version: int = 10,
    inputs: tuple[onnx.ValueInfoProto, ...] | None = None,
) -> ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])
    graph = helper.make_graph(
        nodes,
        "g",
        list((x,) if inputs is None else inputs),
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        list(initializers),
        sparse_initializer=list(sparse),
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=ir_version
    )


def identity(*initializers: TensorProto, sparse: tuple[SparseTensorProto, ...] = ()) -> Model:
    node = helper.make_node("Identity", ["x"], ["y"])
    model = model_of([node], initializers=initializers, sparse=sparse)
    return read_model(model.SerializeToString())


def small() -> ModelProto:
    """A bit of everything that is read."""
    node = helper.make_node("Relu", ["s"], ["t"])
    add = helper.make_node("Add", ["t", "c"], ["then"])
    value = helper.make_tensor_value_info("then", TensorProto.FLOAT, None)
    branch = helper.make_graph([node, add], "b", [], [value])
    other = helper.make_graph([helper.make_node("Neg", ["s"], ["t"])], "c", [], [value])
    other.output[0].name = "t"
    constant = helper.make_node("Constant", [], ["c"], value_floats=[1.0, 2.0, 3.0])
    nodes = [
        constant,
        helper.make_node("Mul", ["x", "w"], ["s"], name="m"),
        helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=other),
    ]
    return model_of(
        nodes,
        initializers=(
            numpy_helper.from_array(np.float32([1, 2, 3]), "w"),
            helper.make_tensor("i", TensorProto.INT64, [3], [1, -2, 1 << 40]),
            helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
        ),
        sparse=(sparse_of(np.float32([[0, 2, 0], [3, 0, 0]]), "s2"),),
    )


def sparse_of(values: np.ndarray[Any, Any], name: str, *, linear: bool = True) -> SparseTensorProto:
    places = np.flatnonzero(values) if linear else np.argwhere(values)
    return SparseTensorProto(
        values=numpy_helper.from_array(values[values != 0], name),
        indices=numpy_helper.from_array(places.astype(np.int64), ""),
        dims=values.shape,
    )


DATA = small().SerializeToString()


def test_a_graph_is_read_as_it_stands() -> None:
    model = read_model(DATA)
    assert [node.op_type for node in model.nodes] == ["Mul", "If"]
    assert (model.nodes[0].name, model.nodes[0].inputs) == ("m", ("x", "w"))
    assert model.inputs == (Value("x", np.dtype(np.float32), ("N", 3)),)
    assert model.outputs == (Value("y", np.dtype(np.float32), None),)
    assert (model.opset, model.ir_version, model.domains) == (18, 10, {})
    assert set(model.constants) == {"w", "i", "yes", "s2", "c"}
    assert model.constants["c"].tolist() == [1, 2, 3]
    assert model.constants["i"].tolist() == [1, -2, 1 << 40]
    assert model.constants["s2"].tolist() == [[0, 2, 0], [3, 0, 0]]
    assert model.constants["yes"].shape == () and model.constants["yes"].dtype == bool
    kept = [node for node in small().graph.node if node.op_type != "Constant"]
    assert [node.raw for node in model.nodes] == [node.SerializeToString() for node in kept]


def test_what_a_subgraph_reads_from_outside_is_known() -> None:
    assert {"s", "c"} <= set(read_model(DATA).nodes[1].captured)
    assert read_model(DATA).nodes[0].captured == ()


def test_a_bundle_has_an_input_that_need_not_be_fed() -> None:
    model = read_model(make_model(classes=3).SerializeToString())
    assert model.optional == {"threshold"}
    assert [value.name for value in model.inputs] == ["input"]
    assert model.constants["threshold"].shape == ()


def test_before_ir_4_initializers_that_are_inputs_cannot_be_fed() -> None:
    proto = small()
    given = helper.make_tensor_value_info("w", TensorProto.FLOAT, [3])
    proto.graph.input.append(given)
    assert read_model(proto.SerializeToString()).optional == {"w"}
    proto.ir_version = 3
    assert read_model(proto.SerializeToString()).optional == frozenset()


TYPES = [
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.INT8,
    TensorProto.INT16,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.UINT8,
    TensorProto.UINT16,
    TensorProto.UINT32,
    TensorProto.UINT64,
    TensorProto.BOOL,
]


@pytest.mark.parametrize("kind", TYPES, ids=TensorProto.DataType.Name)
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "list"])
@pytest.mark.parametrize("shape", [(), (0, 2), (5,), (2, 3)])
def test_every_encoding(kind: int, raw: bool, shape: tuple[int, ...]) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    signed = np.dtype(dtype).kind not in "ub"
    values = (np.arange(int(np.prod(shape))) * 37 - 90 * signed).reshape(shape).astype(dtype)
    if raw:
        tensor = numpy_helper.from_array(values, "t")
    else:
        tensor = helper.make_tensor("t", kind, shape, values.reshape(-1))
    assert tensor.HasField("raw_data") == raw
    found = identity(tensor)
    wanted = numpy_helper.to_array(tensor)
    if kind == TensorProto.BFLOAT16:
        wanted = wanted.astype(np.float32)
        assert found.bfloat16 == {"t"}
    assert found.constants["t"].dtype == wanted.dtype
    assert found.constants["t"].shape == shape
    np.testing.assert_array_equal(found.constants["t"], wanted)
    assert not found.constants["t"].flags.writeable


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40))
@settings(deadline=None)
def test_long_numbers_in_lists(values: list[int]) -> None:
    found = identity(helper.make_tensor("t", TensorProto.INT64, [len(values)], values))
    assert found.constants["t"].tolist() == values


def test_lists_longer_than_a_chunk() -> None:
    values = np.random.default_rng(0).integers(-(2**62), 2**62, 300_000) >> np.arange(300_000) % 62
    found = identity(helper.make_tensor("t", TensorProto.INT64, [len(values)], values))
    np.testing.assert_array_equal(found.constants["t"], values)


@pytest.mark.parametrize(
    ("kind", "number", "values", "unpacked"),
    [
        (TensorProto.FLOAT, 4, [1.5, -2.0], b"\x25\0\0\xc0\x3f\x25\0\0\0\xc0"),
        (TensorProto.INT64, 7, [3, 300], varint_field(7, 3) + varint_field(7, 300)),
        (TensorProto.INT32, 5, [3, -1], varint_field(5, 3) + varint_field(5, -1)),
    ],
)
def test_lists_stored_one_by_one(kind: int, number: int, values: Any, unpacked: bytes) -> None:
    tensor = TensorProto(name="t", data_type=kind, dims=[2]).SerializeToString() + unpacked
    # Protobuf packs what it writes, so the bytes are put together here.
    proto = small()
    head = ModelProto(ir_version=10, opset_import=proto.opset_import).SerializeToString()
    body = small().graph.SerializeToString() + bytes_field(5, tensor)
    assert read_model(head + bytes_field(7, body)).constants["t"].tolist() == values


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_sparse_tensors_become_dense(linear: bool, density: float, dtype: Any) -> None:
    draw = np.random.default_rng(1)
    values = (draw.integers(1, 9, (4, 3, 5)) * (draw.random((4, 3, 5)) < density)).astype(dtype)
    found = identity(sparse=(sparse_of(values, "s", linear=linear),)).constants["s"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)


def test_all_kinds_of_constant_nodes() -> None:
    tensor = numpy_helper.from_array(np.int8([[1, 2]]))
    nodes = [
        helper.make_node("Constant", [], ["a"], value=tensor),
        helper.make_node("Constant", [], ["b"], value_float=1.5),
        helper.make_node("Constant", [], ["c"], value_int=-7),
        helper.make_node("Constant", [], ["d"], value_ints=[1, -2]),
        helper.make_node("Identity", ["x"], ["y"]),
    ]
    nodes[3].domain = "ai.onnx"
    sparse = helper.make_node("Constant", [], ["e"])
    attribute = sparse.attribute.add(name="sparse_value", type=AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.CopyFrom(sparse_of(np.float32([0, 5]), ""))
    found = read_model(model_of([sparse, *nodes]).SerializeToString())
    assert len(found.nodes) == 1
    held = {name: (a.dtype.name, a.tolist()) for name, a in found.constants.items()}
    assert held == {
        "a": ("int8", [[1, 2]]),
        "b": ("float32", 1.5),
        "c": ("int64", -7),
        "d": ("int64", [1, -2]),
        "e": ("float32", [0, 5]),
    }


def test_attributes_by_type() -> None:
    node = helper.make_node(
        "Odd",
        ["x"],
        ["y"],
        domain="some.where",
        f=0.5,
        i=-3,
        s="text",
        fs=[1.0, 2.0],
        n=[-1, 2],
        ss=["a", "b"],
        t=numpy_helper.from_array(np.arange(3)),
    )
    node.attribute.add(name="bytes", type=AttributeProto.STRING, s=b"\xff")
    node.attribute.add(name="zero", type=AttributeProto.INT)
    proto = model_of([node])
    proto.opset_import.append(helper.make_opsetid("some.where", 3))
    model = read_model(proto.SerializeToString())
    found = dict(model.nodes[0].attributes)
    tensor = found.pop("t")
    assert isinstance(tensor, np.ndarray) and tensor.tolist() == [0, 1, 2]
    assert found == {
        "f": 0.5,
        "i": -3,
        "s": "text",
        "fs": (1.0, 2.0),
        "n": (-1, 2),
        "ss": ("a", "b"),
        "bytes": b"\xff",
        "zero": 0,
    }
    assert model.nodes[0].domain == "some.where"
    assert model.domains == {"some.where": 3}


def test_large_initializers_are_views_of_the_file() -> None:
    values = np.zeros(1 << 20, np.float32)
    found = identity(numpy_helper.from_array(values, "w")).constants["w"]
    assert isinstance(found.base, (bytes, np.ndarray)) and not found.flags.owndata


def tensor_with(**fields: Any) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        model.graph.initializer.append(TensorProto(**{"name": "bad", "data_type": 1, **fields}))

    return change


def sparse_with(values: Any, indices: Any, dims: Any) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        sparse = model.graph.sparse_initializer.add(dims=dims)
        sparse.values.CopyFrom(numpy_helper.from_array(np.float32(values), "bad"))
        sparse.indices.CopyFrom(numpy_helper.from_array(np.array(indices, np.int64), ""))

    return change


def outside(tensor: TensorProto) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../weights.bin")


def outside_in_a_branch(model: ModelProto) -> None:
    branch = model.graph.node[2].attribute[0].g
    outside(branch.initializer.add(name="bad", data_type=1, dims=[2]))


def twice(model: ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def node_of(*args: Any, **named: Any) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        model.graph.node.append(helper.make_node(*args, **named))

    return change


REFUSED: list[tuple[Callable[[ModelProto], Any], str]] = [
    (lambda m: outside(m.graph.initializer[0]), "in another file"),
    (outside_in_a_branch, "in another file"),
    (lambda m: m.functions.add(name="f"), "local functions"),
    (lambda m: m.opset_import.pop(), "no version"),
    (lambda m: m.opset_import.add(domain="ai.onnx", version=9), "two versions"),
    (lambda m: m.ClearField("graph"), "no graph"),
    (tensor_with(dims=[3], raw_data=bytes(8)), "8 bytes for 3 values"),
    (tensor_with(dims=[2], raw_data=bytes(8), float_data=[1, 2]), "twice"),
    (tensor_with(dims=[2], int64_data=[1, 2]), "another type"),
    (tensor_with(dims=[2], float_data=[1]), "1 values instead of 2"),
    (tensor_with(dims=[9], data_type=7, int64_data=[1]), "fewer numbers than 9"),
    (tensor_with(dims=[1], data_type=7, int64_data=[1, 2]), "too long"),
    (tensor_with(dims=[2], data_type=7, int64_data=[1 << 40]), "1 numbers instead of 2"),
    (tensor_with(dims=[1 << 40, 1 << 40], data_type=7), "more than 2 GiB"),
    (tensor_with(dims=[0, 1 << 62]), "more than 2 GiB"),
    (tensor_with(dims=[-1, -1], raw_data=bytes(4)), "shape"),
    (tensor_with(dims=[1] * 40, raw_data=bytes(4)), "shape"),
    (tensor_with(dims=[1], data_type=8, string_data=[b"a"]), "tensor type 8"),
    (tensor_with(dims=[1], data_type=99), "tensor type 99"),
    (tensor_with(dims=[1]), "no values"),
    (tensor_with(name="", dims=[0]), "no name"),
    (lambda m: m.graph.initializer[0].segment.CopyFrom(TensorProto.Segment(begin=0)), "segments"),
    (twice, "two called w"),
    (sparse_with([1], [4], [2, 2]), "out of range"),
    (sparse_with([1], [-1], [4]), "out of range"),
    (sparse_with([1], [[0, 2]], [2, 2]), "out of range"),
    (sparse_with([1, 2], [1, 1], [4]), "ascending"),
    (sparse_with([1, 2], [1], [4]), "int64 for each"),
    (sparse_with([1], [0], [1 << 29]), "more memory"),
    (sparse_with([], [], [1 << 40]), "2 GiB"),
    (node_of("Relu", ["nowhere"], ["z"]), "not there yet"),
    (node_of("Relu", ["x"], ["y"]), "two values called y"),
    (node_of("Relu", ["x"], []), "no output"),
    (node_of("", ["x"], ["z"]), "no operator"),
    (node_of("Constant", [], ["z"]), "is none"),
    (node_of("Constant", [], ["z"], value_string="a"), "value_string"),
    (lambda m: m.graph.output.add(name="q"), "nothing makes the output q"),
    (lambda m: m.graph.input.append(m.graph.input[0]), "two inputs called x"),
    (lambda m: m.graph.node[1].attribute.add(name="q", ref_attr_name="r", type=1), "function"),
    (lambda m: m.graph.node[1].attribute.add(name="q"), "no type"),
    (lambda m: m.graph.node[1].attribute.extend([helper.make_attribute("q", 1)] * 2), "two called"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[text for _, text in REFUSED])
def test_refusals_name_the_reason(change: Callable[[ModelProto], Any], message: str) -> None:
    proto = small()
    change(proto)
    with pytest.raises(BackendError, match=message):
        read_model(proto.SerializeToString())


def test_many_sparse_tensors_share_one_limit() -> None:
    proto = small()
    for index in range(6):
        sparse = proto.graph.sparse_initializer.add(dims=[1 << 24])
        sparse.values.CopyFrom(numpy_helper.from_array(np.float32([1]), f"many{index}"))
        sparse.indices.CopyFrom(numpy_helper.from_array(np.int64([0]), ""))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BackendError, match="more memory"):
        read_model(proto.SerializeToString())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_training_information_is_skipped() -> None:
    proto = small()
    outside(proto.training_info.add().algorithm.initializer.add(name="t"))
    assert len(read_model(proto.SerializeToString()).nodes) == 2


def test_graphs_in_graphs_in_graphs() -> None:
    node = b""
    for _ in range(500):
        attribute = (
            bytes_field(1, b"g") + varint_field(20, 5) + bytes_field(6, bytes_field(1, node))
        )
        node = bytes_field(4, b"If") + bytes_field(2, b"o") + bytes_field(5, attribute)
    graph = small().graph.SerializeToString() + bytes_field(1, node)
    proto = small()
    proto.ClearField("graph")
    with pytest.raises(BackendError, match="nested too deep"):
        read_model(proto.SerializeToString() + bytes_field(7, graph))


def test_a_file_of_nothing_but_fields_is_given_up() -> None:
    started = time.monotonic()
    with pytest.raises(BackendError, match="too many parts"):
        read_model(bytes_field(7, bytes_field(1, b"") * 3_000_000))
    assert time.monotonic() - started < 20


def test_a_graph_in_two_parts_is_refused() -> None:
    # Protobuf would merge them.
    with pytest.raises(BackendError, match="twice"):
        read_model(DATA + bytes_field(7, b""))


def survives(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            model = read_model(data)
        except BackendError as error:
            assert "\n" not in str(error)
        else:
            assert isinstance(model, Model)
            assert sum(sys.getsizeof(v) for v in model.constants.values()) < 1 << 31


def test_a_file_cut_off_anywhere_is_refused() -> None:
    for length in range(len(DATA)):
        survives(DATA[:length])
    whole = make_model(classes=3).SerializeToString()
    for length in range(len(whole)):
        survives(whole[:length])


def test_flipped_bits_and_bytes() -> None:
    draw = random.Random(0)
    whole = [DATA, make_model(classes=3).SerializeToString()]
    for index in range(4000):
        data = bytearray(whole[index % 2])
        for _ in range(draw.choice([1, 1, 1, 2, 8])):
            at = draw.randrange(len(data))
            data[at] = draw.choice([draw.randrange(256), data[at] ^ 1 << draw.randrange(8), 0xFF])
        survives(bytes(data))


def test_parts_taken_out_doubled_or_swapped() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        start, end = sorted(draw.randrange(len(DATA)) for _ in range(2))
        part, at = DATA[start:end], draw.randrange(len(DATA))
        survives(DATA[:start] + DATA[end:])
        survives(DATA[:at] + part + DATA[at:])


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_random_bytes(data: bytes) -> None:
    survives(data)
    survives(bytes_field(7, data))
    survives(varint_field(1, 8) + bytes_field(8, varint_field(2, 18)) + bytes_field(7, data))
