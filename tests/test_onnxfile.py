from __future__ import annotations

import struct

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from moon.errors import BundleError
from moon.onnxfile import (
    FLOAT32,
    INT64,
    find_initializer,
    has_external_data,
    has_initializer,
    patch_matrix,
    patch_scalar,
    patch_vector,
    read_matrix,
    read_scalar,
    read_vector,
)
from tests.bundles import make_model

MODEL = make_model(classes=3)
DATA = MODEL.SerializeToString()


def outside(name: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../weights.bin")
    return tensor


def test_every_initializer_is_found_where_onnx_has_it() -> None:
    for tensor in MODEL.graph.initializer:
        found = find_initializer(DATA, tensor.name)
        assert DATA[found.offset : found.offset + found.length] == tensor.raw_data
        assert (found.dtype, found.dims) == (tensor.data_type, tuple(tensor.dims))


def test_scalars_are_read() -> None:
    assert read_scalar(DATA, "threshold") == np.inf
    assert read_scalar(DATA, "gate_score") == 1
    assert find_initializer(DATA, "threshold").dtype == FLOAT32
    assert find_initializer(DATA, "gate_score").dtype == INT64


@given(st.floats(width=32, allow_nan=False))
def test_patching_changes_the_scalar_and_nothing_else(value: float) -> None:
    patched = patch_scalar(DATA, "threshold", value)
    assert len(patched) == len(DATA)
    model = onnx.load_model_from_string(patched)
    for tensor in model.graph.initializer:
        if tensor.name == "threshold":
            assert tensor.raw_data == struct.pack("<f", value)
            tensor.raw_data = struct.pack("<f", np.inf)
    assert model == MODEL
    assert patch_scalar(patched, "threshold", np.inf) == DATA


def test_patching_an_integer() -> None:
    assert read_scalar(patch_scalar(DATA, "gate_score", 3), "gate_score") == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [("threshold", 0.1), ("threshold", 1e300), ("gate_score", 2**70), ("gate_score", 1.5)],
)
def test_a_value_that_does_not_fit_exactly_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        patch_scalar(DATA, name, value)


@given(st.lists(st.floats(width=32), min_size=3, max_size=3))
def test_patching_a_vector_changes_it_and_nothing_else(values: list[float]) -> None:
    bars = np.array(values, np.float32)
    patched = patch_vector(DATA, "thresholds", bars)
    assert len(patched) == len(DATA)
    assert read_vector(patched, "thresholds").tobytes() == bars.tobytes()
    assert patch_vector(patched, "thresholds", read_vector(DATA, "thresholds")) == DATA
    model = onnx.load_model_from_string(patched)
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    assert numpy_helper.to_array(found["thresholds"]).tobytes() == bars.tobytes()


def test_vectors_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"thresholds has 3 values, not \[2\]"):
        patch_vector(DATA, "thresholds", np.zeros(2, np.float32))
    for name in ("threshold", "gate_score", "conv.weight", "known"):
        with pytest.raises(BundleError, match=f"{name} is not a float32 vector"):
            read_vector(DATA, name)


def test_patching_a_matrix_changes_it_and_nothing_else() -> None:
    weight = read_matrix(DATA, "fc.weight")
    assert np.array_equal(
        weight,
        numpy_helper.to_array(
            next(tensor for tensor in MODEL.graph.initializer if tensor.name == "fc.weight")
        ),
    )
    patched = patch_matrix(DATA, "fc.weight", weight + 1)
    assert len(patched) == len(DATA)
    assert np.array_equal(read_matrix(patched, "fc.weight"), weight + 1)
    assert patch_matrix(patched, "fc.weight", weight) == DATA
    with pytest.raises(ValueError, match=f"fc.weight has {weight.size} values"):
        patch_matrix(DATA, "fc.weight", weight.T)
    for name in ("thresholds", "gate_score", "conv.weight"):
        with pytest.raises(BundleError, match=f"{name} is not a float32 matrix"):
            read_matrix(DATA, name)


def test_an_initializer_is_there_or_not() -> None:
    assert has_initializer(DATA, "thresholds") and not has_initializer(DATA, "label")
    assert not has_initializer(
        make_model(classes=3, by_class=False).SerializeToString(), "thresholds"
    )


def test_nan_is_patched_as_nan() -> None:
    assert np.isnan(read_scalar(patch_scalar(DATA, "threshold", np.nan), "threshold"))


def test_missing_and_doubled_initializers_are_refused() -> None:
    with pytest.raises(BundleError, match="no initializer called nope"):
        read_scalar(DATA, "nope")
    doubled = onnx.ModelProto.FromString(DATA)
    doubled.graph.initializer.append(numpy_helper.from_array(np.float32(3), "threshold"))
    with pytest.raises(BundleError, match="2 initializers called threshold"):
        read_scalar(doubled.SerializeToString(), "threshold")
    # Protobuf merges two graphs in one file: the second's initializers count as well.
    second = onnx.ModelProto()
    second.graph.initializer.append(numpy_helper.from_array(np.float32(3), "threshold"))
    merged = DATA + second.SerializeToString()
    assert len(onnx.ModelProto.FromString(merged).graph.initializer) > len(MODEL.graph.initializer)
    with pytest.raises(BundleError, match="2 initializers called threshold"):
        read_scalar(merged, "threshold")


def test_a_tensor_is_no_scalar() -> None:
    with pytest.raises(BundleError, match=r"conv.bias is not a float32 or int64 scalar"):
        read_scalar(DATA, "conv.bias")


def test_a_scalar_without_raw_data_is_refused() -> None:
    model = onnx.ModelProto()
    model.graph.initializer.append(helper.make_tensor("threshold", TensorProto.FLOAT, [], [1.0]))
    with pytest.raises(BundleError, match="raw data once, not 0 times"):
        read_scalar(model.SerializeToString(), "threshold")


def test_a_scalar_of_the_wrong_length_is_refused() -> None:
    model = onnx.ModelProto()
    tensor = TensorProto(name="threshold", data_type=TensorProto.FLOAT, raw_data=b"12345678")
    model.graph.initializer.append(tensor)
    with pytest.raises(BundleError, match="8 bytes for shape"):
        read_scalar(model.SerializeToString(), "threshold")


def test_packed_and_single_dimensions_are_read_alike() -> None:
    name, raw = b"\x42\x01t", b"\x4a\x08" + bytes(8)
    single = b"\x08\x01\x08\x02\x10\x01" + name + raw
    packed = b"\x0a\x02\x01\x02\x10\x01" + name + raw
    for body in (single, packed):
        graph = b"\x2a" + bytes([len(body)]) + body
        data = b"\x3a" + bytes([len(graph)]) + graph
        assert find_initializer(data, "t").dims == (1, 2)


def places() -> dict[str, onnx.ModelProto]:
    """A tensor stored outside, in every place where a tensor can be."""
    found = {name: onnx.ModelProto.FromString(DATA) for name in ("initializer", "values", "node")}
    found["initializer"].graph.initializer.append(outside("w"))
    sparse = found["values"].graph.sparse_initializer.add()
    sparse.values.CopyFrom(outside("w"))
    constant = helper.make_node("Constant", [], ["c"], value=outside("w"))
    found["node"].graph.node.append(constant)

    branch = helper.make_graph([constant], "branch", [], [])
    choice = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    found["subgraph"] = onnx.ModelProto.FromString(DATA)
    found["subgraph"].graph.node.append(choice)

    found["function"] = onnx.ModelProto.FromString(DATA)
    found["function"].functions.add(name="f", domain="d").node.append(choice)

    found["training"] = onnx.ModelProto.FromString(DATA)
    found["training"].training_info.add().algorithm.node.append(constant)

    found["list"] = onnx.ModelProto.FromString(DATA)
    node = found["list"].graph.node.add(op_type="Odd")
    node.attribute.add(name="many").tensors.append(outside("w"))

    found["indices"] = onnx.ModelProto.FromString(DATA)
    node = found["indices"].graph.node.add(op_type="Constant")
    node.attribute.add(name="sparse_value").sparse_tensor.indices.CopyFrom(outside("w"))
    return found


@pytest.mark.parametrize("place", places())
def test_external_data_is_found_wherever_it_hides(place: str) -> None:
    assert has_external_data(DATA) is None
    assert has_external_data(places()[place].SerializeToString()) == "w"


def test_a_location_without_entries_counts_as_outside() -> None:
    model = onnx.ModelProto()
    model.graph.initializer.add(name="w").data_location = TensorProto.EXTERNAL
    assert has_external_data(model.SerializeToString()) == "w"


def test_nesting_without_end_is_refused() -> None:
    data = b""
    for _ in range(200):
        data = b"\x32" + _length(len(data)) + data  # attribute.g
        data = b"\x2a" + _length(len(data)) + data  # node.attribute
        data = b"\x0a" + _length(len(data)) + data  # graph.node
    with pytest.raises(BundleError, match="nested too deep"):
        has_external_data(b"\x3a" + _length(len(data)) + data)


def _length(n: int) -> bytes:
    out = b""
    while n > 0x7F:
        out, n = out + bytes([n & 0x7F | 0x80]), n >> 7
    return out + bytes([n])


@pytest.mark.parametrize(
    "data",
    [b"\xff" * 20, b"\x3a\xff\xff\xff\x7f", b"\x3a", b"\x3b\x00", b"\x00\x01", b"\x3d\x00\x00"],
    ids=["endless number", "past the end", "cut", "group", "field zero", "short fixed"],
)
def test_malformed_files_are_refused(data: bytes) -> None:
    for call in (has_external_data, lambda d: read_scalar(d, "threshold")):
        with pytest.raises(BundleError, match="the ONNX file is damaged"):
            call(data)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_gives_a_bundle_error_or_an_answer_and_nothing_else(data: st.DataObject) -> None:
    broken = bytearray(DATA)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(DATA) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(broken[: data.draw(st.integers(0, len(DATA)))])
    for call in (has_external_data, lambda d: read_scalar(d, "threshold")):
        try:
            call(cut)
        except BundleError as error:
            assert "ONNX" in str(error) or "initializer" in str(error)
