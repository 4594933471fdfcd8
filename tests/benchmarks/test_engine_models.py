"""benchmarks/engine_models.py: models, their multiply-adds, their form for DeepSparse."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moon.errors import DataError, ExportError
from moon.export.head import add_head
from moon.export.pack import pack
from moon.export.session import Session

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def models():
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("engine_models")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def sparse(models, tmp_path_factory):
    """ResNet-18 for small images, 90% sparse."""
    return models.made(tmp_path_factory.mktemp("models"), "r18c", 90.0, "unstructured")


def graph(nodes, tensors, *, size=8):
    """Of [N, 2, size, size] to [N, 3]."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("input", ["N", 2, size, size]), ("logits", ["N", 3]))
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    made = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def saved(model, tmp_path, name="model-1.onnx"):
    path = tmp_path / name
    path.write_bytes(model.SerializeToString())
    return path


def small(pooling="ReduceMean"):
    """A strided convolution, one with a group for each channel, and a product."""
    first = np.ones((4, 2, 3, 3), np.float32)
    first[0] = 0
    second = np.ones((4, 1, 3, 3), np.float32)
    last = np.ones((3, 4), np.float32)
    last[0, 0] = 0
    nodes = [
        helper.make_node("Conv", ["input", "a"], ["x"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["x"], ["x1"]),
        helper.make_node("Conv", ["x1", "b"], ["y"], group=4),
        helper.make_node(pooling, ["y", "axes"], ["p"], keepdims=1),
        helper.make_node("Reshape", ["p", "flat"], ["f"]),
        helper.make_node("Gemm", ["f", "c"], ["logits"], transB=1),
    ]
    shapes = {"axes": np.array([-2, -1]), "flat": np.array([0, 4])}
    return graph(nodes, {"a": first, "b": second, "c": last, **shapes})


def test_multiply_adds_by_hand(models, tmp_path):
    found = models.opened(saved(small(), tmp_path), tmp_path)
    # 4x4 places, then 2x2 of them.
    assert found.macs == (72 * 16 + 36 * 4 + 12, 54 * 16 + 36 * 4 + 11)
    assert (found.shape, found.input, found.index, found.family) == ((2, 8, 8), "input", 0, "model")


def test_models_are_as_sparse_as_asked_and_kept(models, sparse):
    graph = onnx.load(str(sparse)).graph
    weights = [numpy_helper.to_array(t) for t in graph.initializer if len(t.dims) in (2, 4)]
    left = sum(np.count_nonzero(w) for w in weights) / sum(w.size for w in weights)
    assert left == pytest.approx(0.1, abs=2e-4)
    before = sparse.stat().st_mtime_ns
    assert models.made(sparse.parent, "r18c", 90.0, "unstructured") == sparse
    assert sparse.stat().st_mtime_ns == before


def test_block_masks_come_in_fours(models, tmp_path, monkeypatch):
    monkeypatch.setitem(models.FAMILIES, "tiny", models.Family("cnn", 16, 11))
    path = models.made(tmp_path, "tiny", 90.0, "block4x1")
    assert path.name == "tiny-90-block4x1.onnx"
    tensors = [t for t in onnx.load(str(path)).graph.initializer if len(t.dims) == 4]
    for tensor in tensors:
        kept = numpy_helper.to_array(tensor) != 0
        four = kept.reshape(-1, 4, *kept.shape[1:])
        assert (four == four[:, :1]).all()


def test_a_packed_model_with_its_head_counts_the_same(models, sparse, tmp_path):
    whole = add_head(onnx.load(str(sparse)), outputs=11, unknown_index=10)
    path = saved(pack(whole, weights="compact", values="fp32"), tmp_path, "compact.onnx")
    packed = models.opened(path, tmp_path)
    assert packed.macs == models.opened(sparse, tmp_path).macs
    names = [value.name for value in onnx.load(str(path)).graph.output]
    assert names[packed.index] == "logits" and len(names) > 1


@pytest.mark.parametrize("batch", [1, 3])
def test_the_form_for_deepsparse_answers_the_same(models, sparse, tmp_path, batch):
    whole = add_head(onnx.load(str(sparse)), outputs=11, unknown_index=10)
    model = models.opened(saved(whole, tmp_path), tmp_path)
    path = models.for_deepsparse(model, tmp_path, batch=batch)
    found = onnx.load(str(path))
    assert [(one.domain, one.version) for one in found.opset_import] == [("", 13)]
    assert found.graph.input[0].type.tensor_type.shape.dim[0].dim_value == batch
    operators = {node.op_type for node in found.graph.node}
    assert operators == {"Conv", "Relu", "Add", "GlobalAveragePool", "Flatten", "Gemm"}
    images = np.random.default_rng(0).standard_normal((batch, 3, 32, 32)).astype(np.float32)
    expected = Session(whole).run({"input": images})["logits"]
    np.testing.assert_allclose(
        Session(found).run({"input": images})["logits"], expected, rtol=1e-4, atol=1e-5
    )


def test_pooling_that_drops_its_dimensions_is_plain_too(models, tmp_path):
    model = small()
    pool, flatten = model.graph.node[3], model.graph.node[4]
    pool.attribute[0].i = 0
    flatten.op_type = "Identity"
    del flatten.input[1]
    path = models.for_deepsparse(models.opened(saved(model, tmp_path), tmp_path), tmp_path, batch=1)
    found = onnx.load(str(path))
    assert {"GlobalAveragePool", "Flatten"} < {node.op_type for node in found.graph.node}
    images = np.random.default_rng(0).standard_normal((1, 2, 8, 8)).astype(np.float32)
    expected = Session(small()).run({"input": images})["logits"]
    np.testing.assert_allclose(Session(found).run({"input": images})["logits"], expected, rtol=1e-5)


def test_what_opset_13_does_not_know_is_refused(models, tmp_path):
    model = models.opened(saved(small("ReduceMax"), tmp_path), tmp_path)
    with pytest.raises(ExportError, match="opset 13"):
        models.for_deepsparse(model, tmp_path, batch=1)


def test_a_model_of_no_images_is_refused(models, tmp_path):
    model = small()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    with pytest.raises(DataError, match="fixed size"):
        models.opened(saved(model, tmp_path), tmp_path)
