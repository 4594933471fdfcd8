from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moon.errors import ExportError, UsageError
from moon.export.foreign import from_onnx
from moon.export.intake import read_foreign
from moon.export.pack import pack
from moon.export.session import run

from .conftest import MakeForeign

IMAGES = np.random.default_rng(0).standard_normal((7, 3, 8, 8)).astype(np.float32)


def original(path: Path, batch: int, last: bool = False) -> Any:
    model = onnx.load(path)
    if last:
        del model.graph.node[-1]
        model.graph.output[0].name = "z"
    parts = [run(model, {"score": IMAGES[i : i + batch]})["z"] for i in range(0, 7, batch)]
    return np.concatenate(parts)


@pytest.mark.parametrize(("batch", "opset", "ir_version"), [(1, 13, 8), ("n", 18, 10), (7, 9, 4)])
def test_the_batch_becomes_free_and_names_standard(
    foreign: MakeForeign, batch: int | str, opset: int, ir_version: int
) -> None:
    path = foreign(batch=batch, opset=opset, ir_version=ir_version)
    taken = read_foreign(path)
    assert (taken.channels, taken.size, taken.outputs) == (3, (8, 8), 5)
    assert [v.name for v in taken.body.graph.input] == ["input"]
    assert [v.name for v in taken.body.graph.output] == ["logits"]
    assert "BatchNormalization" not in [node.op_type for node in taken.body.graph.node]
    assert taken.body.opset_import[0].version == 18
    assert taken.body.ir_version <= 10
    onnx.checker.check_model(taken.body, full_check=True)
    expected = original(path, batch if isinstance(batch, int) else 7)
    for size in (1, 2, 7):
        got = run(taken.body, {"input": IMAGES[:size]})["logits"]
        np.testing.assert_allclose(got, expected[:size], atol=1e-5)


@pytest.mark.parametrize("allow_zero", [0, 1])
def test_a_batch_that_may_not_be_copied_by_zero_becomes_free(
    tmp_path: Path, allow_zero: int
) -> None:
    # As torch's newer exporter flattens.
    shape = numpy_helper.from_array(np.array([1, 192]), "shape")
    weight = numpy_helper.from_array(np.ones((192, 5), np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["x", "shape"], ["flat"], allowzero=allow_zero),
            helper.make_node("MatMul", ["flat", "w"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", F, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", F, [1, 5])],
        [shape, weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "flat.onnx")
    body = read_foreign(tmp_path / "flat.onnx").body
    assert run(body, {"input": IMAGES})["logits"].shape == (7, 5)


def test_names_that_the_head_needs_give_way(foreign: MakeForeign) -> None:
    # Its input is called score and a value inside label.
    body = read_foreign(foreign()).body
    used = {name for node in body.graph.node for name in (*node.input, *node.output)}
    assert not used & {"score", "label"}


@pytest.mark.parametrize("last", ["Softmax", "LogSoftmax"])
def test_a_softmax_at_the_end_is_taken_off(foreign: MakeForeign, last: str) -> None:
    path = foreign(batch="n", last=last)
    taken = read_foreign(path)
    assert taken.removed == last
    got = run(taken.body, {"input": IMAGES})["logits"]
    np.testing.assert_allclose(got, original(path, 7, last=True), atol=1e-5)


def test_a_packed_model_can_be_taken_in_again(foreign: MakeForeign, tmp_path: Path) -> None:
    body = read_foreign(foreign()).body
    onnx.save(pack(body, weights="coo"), tmp_path / "coo.onnx")
    again = read_foreign(tmp_path / "coo.onnx").body
    one, other = (run(m, {"input": IMAGES})["logits"] for m in (body, again))
    np.testing.assert_array_equal(one, other)


def test_weights_in_a_file_beside_it_are_taken_in(foreign: MakeForeign, tmp_path: Path) -> None:
    path = foreign(batch="n")
    inside = read_foreign(path).body
    onnx.save(
        onnx.load(path),
        tmp_path / "outside.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    outside = read_foreign(tmp_path / "outside.onnx").body
    assert outside.SerializeToString() == inside.SerializeToString()
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ExportError, match="not a valid ONNX model"):
        read_foreign(tmp_path / "outside.onnx")


def test_what_is_no_onnx_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        read_foreign(tmp_path / "missing.onnx")
    for name, data in (("text", b"hello"), ("empty", b""), ("half", b"\x08\x08\x3a\xff\x01")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ExportError, match="not a valid ONNX model"):
            read_foreign(tmp_path / name)


def test_a_free_image_size_needs_to_be_given(foreign: MakeForeign) -> None:
    path = foreign(batch="n", size=("h", "w"))
    with pytest.raises(ExportError, match="leaves height and width free"):
        read_foreign(path)
    assert read_foreign(path, size=(8, 8)).size == (8, 8)
    with pytest.raises(UsageError, match="contradicts"):
        read_foreign(foreign(name="fixed.onnx"), size=(16, 16))


def one_node(
    op: str, inputs: list[tuple[str, int, list[Any]]], outputs: list[tuple[str, int, list[Any]]]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(op, [inputs[0][0]], [name]) for name, _, _ in outputs],
        "g",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


F = TensorProto.FLOAT


@pytest.mark.parametrize(
    ("inputs", "outputs", "says"),
    [
        ([("x", F, ["N", 10])], [("y", F, ["N", 10])], r"must be float \[N, C, H, W\]"),
        (
            [("x", TensorProto.FLOAT16, ["N", 3, 8, 8])],
            [("y", TensorProto.FLOAT16, ["N", 192])],
            "and is float16",
        ),
        ([("x", F, ["N", 8, 8, 3])], [("y", F, ["N", 192])], "1 or 3 channels"),
        (
            [("x", F, ["N", 3, 8, 8]), ("m", F, [1])],
            [("y", F, ["N", 192])],
            "must have one input, and has x, m",
        ),
        (
            [("x", F, ["N", 3, 8, 8])],
            [("y", F, ["N", 192]), ("z", F, ["N", 192])],
            "one float output, or one called logits, and has y \\(float\\), z",
        ),
        (
            [("x", F, ["N", 3, 8, 8])],
            [("y", F, ["N", 3, 8, 8])],
            r"must give logits \[N, classes\]",
        ),
    ],
)
def test_what_is_no_image_classifier_is_refused(
    tmp_path: Path, inputs: Any, outputs: Any, says: str
) -> None:
    op = "Relu" if len(outputs[0][2]) == len(inputs[0][2]) else "Flatten"
    onnx.save(one_node(op, inputs, outputs), tmp_path / "odd.onnx")
    with pytest.raises(ExportError, match=says):
        read_foreign(tmp_path / "odd.onnx")


def test_the_output_called_logits_is_chosen(tmp_path: Path) -> None:
    model = one_node(
        "Flatten",
        [("x", F, ["N", 3, 8, 8])],
        [("features", F, ["N", 192]), ("logits", F, ["N", 192])],
    )
    onnx.save(model, tmp_path / "two.onnx")
    taken = read_foreign(tmp_path / "two.onnx")
    assert (taken.outputs, len(taken.body.graph.node)) == (192, 1)


def test_a_batch_that_cannot_be_freed_is_refused_later(tmp_path: Path) -> None:
    # The batch is multiplied into another dimension, where nobody can find it.
    shape = numpy_helper.from_array(np.array([192]), "shape")
    back = numpy_helper.from_array(np.array([1, 192]), "back")
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["x", "shape"], ["flat"]),
            helper.make_node("Reshape", ["flat", "back"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", F, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", F, [1, 192])],
        [shape, back],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "stuck.onnx")
    with pytest.raises(ExportError, match="does not run with a batch of 2"):
        from_onnx(
            tmp_path / "stuck.onnx",
            tmp_path / "out",
            classes=[str(i) for i in range(192)],
            mean=[0.5],
            std=[0.5],
        )
    assert not (tmp_path / "out").exists()


def test_a_model_whose_images_depend_on_each_other_is_refused(tmp_path: Path) -> None:
    # As batch normalisation does in training.
    weight = numpy_helper.from_array(np.ones((192, 5), np.float32), "w")
    axes = numpy_helper.from_array(np.array([0]), "axes")
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
            helper.make_node("Sub", ["x", "mean"], ["centred"]),
            helper.make_node("Flatten", ["centred"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", F, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", F, ["n", 5])],
        [axes, weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "training.onnx")
    with pytest.raises(ExportError, match=r"depend on its batch.*after model\.eval\(\)"):
        from_onnx(
            tmp_path / "training.onnx",
            tmp_path / "out",
            classes=[str(i) for i in range(5)],
            mean=[0.5],
            std=[0.5],
        )
