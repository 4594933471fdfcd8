"""An int8 graph keeps zeros and answers, says what it changed, and uses no image twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from moon.bundle import Bundle
from moon.data.load import load_pixels
from moon.data.source import open_source
from moon.errors import CalibrationError, ExportError, ParityError, UsageError
from moon.export.checks import check_packed
from moon.export.classifier import classifier_nodes
from moon.export.graph import array, copied, initializers, set_initializer, weight_names
from moon.export.int8 import to_int8, without_cut_pairs
from moon.export.int8_check import Int8Answers
from moon.export.pack import pack
from moon.export.ranges import RangeImages
from moon.export.session import Session
from moon.export.trt.int8 import signed
from moon.export.trt.sparsity import lint
from moon.runtime import Predictor
from moon.runtime.calibrate import calibrate
from moon.runtime.unpack import weights
from moon.runtime.verify import verify
from tests.export.conftest import PREPROCESS, TEST, TRAIN, from_digits

Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def images() -> Floats:
    return PREPROCESS.normalise(load_pixels(open_source(TRAIN), PREPROCESS, np.arange(256)))


@pytest.fixture(scope="module")
def int8(body: ModelProto, images: Floats) -> ModelProto:
    return to_int8(body, [images[:128], images[128:]])


@pytest.fixture(scope="module")
def bundle(digits_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("int8") / "digits"
    return from_digits(digits_onnx, out, precision="int8", fit=TRAIN, max_change=0.03)


def unchanged(model: ModelProto, images: Floats) -> Floats:
    """Logits, node by node as the graph says."""
    return Session(model, optimise=False).run({"input": images})["logits"]


def residual() -> ModelProto:
    """Conv, ReLU, Conv plus a shortcut, ReLU, mean, Gemm; half the weights are zero."""
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> TensorProto:
        kept = rng.random(shape) < 0.5 if len(shape) > 1 else True
        values = rng.standard_normal(shape) * kept / np.sqrt(np.prod(shape[1:]) or 1)
        return numpy_helper.from_array(values.astype(np.float32), name)

    held = [tensor("a", 8, 2, 3, 3), tensor("b", 8, 8, 3, 3), tensor("c", 8, 2, 1, 1)]
    held += [tensor("a_bias", 8), tensor("head", 5, 8), tensor("head_bias", 5)]
    nodes = [
        helper.make_node("Conv", ["input", "a", "a_bias"], ["x"], pads=[1] * 4),
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Conv", ["y", "b"], ["z"], pads=[1] * 4),
        helper.make_node("Conv", ["input", "c"], ["s"]),
        helper.make_node("Add", ["z", "s"], ["sum"]),
        helper.make_node("Clip", ["sum", "low", "high"], ["cut"]),
        helper.make_node("GlobalAveragePool", ["cut"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head", "head_bias"], ["logits"], transB=1),
    ]
    for i, node in enumerate(nodes):
        node.name = f"n{i}"
    held += [numpy_helper.from_array(np.float32(v), n) for n, v in (("low", 0), ("high", 6))]
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 2, 6, 6])
    made = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 5])
    graph = helper.make_graph(nodes, "g", [given], [made], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_weights_are_int8_and_zeros_stay(int8: ModelProto, body: ModelProto) -> None:
    held, before = initializers(int8), initializers(body)
    assert weight_names(int8) == weight_names(body)
    *layers, last = weight_names(int8)
    assert held[last].data_type == TensorProto.FLOAT and classifier_nodes(int8)
    for name in layers:
        weight, stored = array(before[name]), array(held[name])
        assert stored.dtype == np.int8 and array(held[f"{name}/scale"]).shape == (len(weight),)
        assert not stored[weight == 0].any() and not array(held[f"{name}/zero_point"]).any()
        assert np.abs(stored.astype(int)).reshape(len(stored), -1).max(axis=1).min() >= 127
    assert int8.ir_version <= 10 and {node.domain for node in int8.graph.node} == {""}


def test_answers_are_close(int8: ModelProto, body: ModelProto, images: Floats) -> None:
    wide, narrow = (Session(m).run({"input": images})["logits"] for m in (body, int8))
    assert 0 < np.abs(wide - narrow).max() < 0.1 * np.abs(wide).max()
    assert (wide.argmax(axis=1) == narrow.argmax(axis=1)).mean() > 0.97


def test_tensorrts_form_gives_the_same_numbers(images: Floats) -> None:
    x = np.random.default_rng(1).standard_normal((64, 2, 6, 6)).astype(np.float32)
    model = to_int8(residual(), [x])
    pairs = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
    joined = copied(model)
    assert without_cut_pairs(joined) == 2
    assert sum(node.op_type == "QuantizeLinear" for node in joined.graph.node) == pairs - 2
    assert np.array_equal(unchanged(joined, x), unchanged(model, x))
    turned = signed(model)
    held = initializers(turned)
    zeros = [array(held[n.input[2]]) for n in turned.graph.node if n.op_type == "QuantizeLinear"]
    assert len(zeros) == pairs - 2 and all(z == 0 and z.dtype == np.int8 for z in zeros)
    assert np.array_equal(unchanged(turned, x), unchanged(model, x))
    assert signed(turned) is turned


def test_tensorrt_builds_an_int8_engine(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    from moon.export.trt.engine import add_engine
    from moon.export.trt.request import EngineRequest

    copy = Bundle.open(shutil.copytree(bundle.path, tmp_path / "b"))
    made, record = add_engine(copy, EngineRequest(targets=(86,)), images=open_source(TEST))
    assert record.precision == "int8" and record.file.endswith("sm_86-int8.engine")
    assert (made.path / record.file).stat().st_size > 1000
    assert record.parity["max_abs"] == 0 and record.parity["gate_agreement"] == 1


def test_an_int8_engine_needs_an_int8_bundle(digits_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    from moon.export.trt.engine import add_engine
    from moon.export.trt.request import EngineRequest

    wide = from_digits(digits_onnx, tmp_path / "b")
    with pytest.raises(UsageError, match="Export it with --precision int8"):
        add_engine(wide, EngineRequest(targets=(86,), precision="int8"))


def test_packing_is_exact_and_smaller(int8: ModelProto, body: ModelProto, images: Floats) -> None:
    packed = pack(int8)
    check_packed(packed, int8)
    assert sum(w.dtype == np.int8 for w in weights(packed.SerializeToString()).values()) == 3
    assert packed.ByteSize() < pack(body, values="fp16").ByteSize()
    a, b = (Session(m).run({"input": images})["logits"] for m in (int8, packed))
    assert np.array_equal(a, b)


def test_the_2_4_rule_is_seen_through_int8() -> None:
    model = residual()
    kept = np.tile(np.array([1, 1, 0, 0]), 2).reshape(1, 8, 1, 1)
    weight = array(initializers(model)["b"]) * kept.astype(np.float32)
    set_initializer(model, "b", weight + (weight == 0) * kept.astype(np.float32))
    x = np.random.default_rng(1).standard_normal((8, 2, 6, 6)).astype(np.float32)
    for graph in (model, pack(signed(to_int8(model, [x])))):
        found = {layer.weight: layer.eligible for layer in lint(graph.SerializeToString())}
        assert found["b"] and not found["a"]


def test_a_graph_without_layers_for_it_is_refused() -> None:
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 2, 2])
    made = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])
    weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], name="flat"),
        helper.make_node("MatMul", ["flat", "w"], ["logits"], name="last"),
    ]
    graph = helper.make_graph(nodes, "g", [given], [made], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(ExportError, match=r"int8.*Export with --precision fp16 or fp32"):
        to_int8(model, [np.zeros((4, 1, 2, 2), np.float32)])


def test_ranges_come_from_training_images_else_from_a_share() -> None:
    train, test = open_source(TRAIN), open_source(TEST)
    chosen = RangeImages.choose(train, test)
    assert chosen.fitted_to.part == "training" and len(chosen.fitted_to.rows) == 512
    assert chosen.held_out is test
    chosen = RangeImages.choose(None, test)
    rows = chosen.fitted_to.rows
    assert chosen.fitted_to.part == "held-out" and len(rows) == len(test) // 5
    pixels = load_pixels(test, PREPROCESS, rows).reshape(len(rows), -1)
    rest = load_pixels(chosen.held_out, PREPROCESS).reshape(len(chosen.held_out), -1)
    assert len(rest) + len(rows) == len(test)
    assert not {p.tobytes() for p in pixels} & {p.tobytes() for p in rest}


def test_images_that_cannot_serve_are_refused() -> None:
    train, test = open_source(TRAIN), open_source(TEST)
    with pytest.raises(UsageError, match=r"none are given\. Give them with --data"):
        RangeImages.choose(train, None)
    with pytest.raises(CalibrationError, match=r"has 159 images.*Give 160 or more with --data"):
        RangeImages.choose(None, test.select(np.arange(159)))
    with pytest.raises(CalibrationError, match="ranges of an int8 graph were fitted to"):
        RangeImages.choose(train, train)


def test_a_bundle_computes_in_int8(bundle: Bundle) -> None:
    export = bundle.manifest.provenance["export"]
    assert bundle.manifest.precision == export["precision"] == "int8"
    assert 0 <= export["parity"]["rounded_to_zero"] < 300
    figures = export["parity"]["int8"]
    assert figures["top1_agreement"] >= 0.97 and figures["gate_agreement"] >= 0.97
    assert abs(figures["accuracy"]["int8"] - figures["accuracy"]["fp32"]) <= 0.03
    assert figures["ranges"]["part"] == "training" and figures["ranges"]["images"] == 512
    assert bundle.manifest.sparsity.share > 0.85
    assert all(check.ok for check in verify(bundle)), verify(bundle)
    pixels = load_pixels(open_source(TEST), PREPROCESS, np.arange(8))
    decisions = Predictor.open(bundle).predict(list(pixels))
    notes: list[str] = []
    engine = Predictor.open(bundle, backend="sparse", warn=notes.append)
    assert [d.label for d in engine.predict(list(pixels))] == [d.label for d in decisions]


def test_images_of_the_ranges_do_not_calibrate(digits_onnx: Path, tmp_path: Path) -> None:
    made = from_digits(digits_onnx, tmp_path / "b", precision="int8", max_change=0.05)
    test = open_source(TEST)
    ranges = made.manifest.provenance["export"]["parity"]["int8"]["ranges"]
    gate = made.gate()
    assert ranges["part"] == "held-out" and gate is not None
    assert gate.n + ranges["images"] == len(test)
    with pytest.raises(CalibrationError, match="fitted"):
        calibrate(made, test)


def test_too_much_change_is_refused_with_the_figures() -> None:
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((200, 3)).astype(np.float32)
    narrow = wide.copy()
    narrow[:5] = -narrow[:5]

    def answers(logits: Floats) -> dict[str, NDArray[np.generic]]:
        return {"logits": logits, "label": logits.argmax(axis=1), "score": logits.max(axis=1)}

    labels = wide.argmax(axis=1)
    found = Int8Answers(answers(narrow), answers(wide), labels)
    report = found.check(0.05, 0.05)
    assert report["accuracy"] == {"fp32": 1.0, "int8": 0.975}
    assert report["top1_agreement"] == 0.975
    with pytest.raises(
        ParityError,
        match=r"another label for 2.50% of 200 images, more than 2.00%; accuracy 100.00% to "
        r"97.50%. .*--max-change 0.03",
    ):
        found.check(0.05, 0.02)
    assert Int8Answers(answers(wide), answers(wide), None).check(0.05, 0.0)["accuracy"] is None


def test_the_file_is_standard_onnx(bundle: Bundle) -> None:
    model = onnx.load_model_from_string(bundle.model_bytes())
    onnx.checker.check_model(model, full_check=True)
    kinds = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "ScatterElements"} <= kinds
