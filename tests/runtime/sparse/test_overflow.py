"""Images whose numbers overflow: never an answer that looks like one, as with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from moon.runtime import SparseEngine, open_backend
from moon.runtime.predictor import Predictor

from .exported import export
from .graphs import Graph, reference

Then = Callable[[Graph, str], str]

pytestmark = pytest.mark.usefixtures("small_pays")

THEN: dict[str, Then] = {
    "nothing": lambda g, y: y,
    "relu": lambda g, y: g.add("Relu", y),
    "largest": lambda g, y: g.add("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2]),
    "mean": lambda g, y: g.add("GlobalAveragePool", y),
    "linear": lambda g, y: g.add(
        "Gemm", g.add("Flatten", g.add("GlobalAveragePool", y)), g.weight(5, 8, density=0.5),
        transB=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("then", THEN)
def test_an_image_that_overflows_is_nan_and_the_others_are_not_touched(then: str) -> None:
    graph = Graph(4, 8, 8)
    THEN[then](graph, graph.conv(graph.conv("x", 4, 4), 8, 4))
    data, x = graph.data(), graph.images(3)
    x[1] = np.sign(x[1]) * 3e38  # plus and minus infinity meet
    engine = SparseEngine(data, force=True)
    assert engine.handed_over == ""
    found, expected = engine.run(x), reference(data, x)[0]
    assert isinstance(found, np.ndarray)
    assert not np.isfinite(expected[1]).all()
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-4)


def test_a_part_of_onnx_runtime_that_makes_infinity_spoils_its_image() -> None:
    """Even where all weights of the channel are zero, so that the engine would not see it."""
    graph = Graph(4, 8, 8)
    weight = np.zeros((8, 4, 3, 3))
    weight[:, 1] = 1
    y = graph.add("Conv", graph.add("Reciprocal", "x"), graph.constant(weight), pads=[1] * 4)
    graph.add("Relu", y)
    x = np.abs(graph.images(3)) + 1
    x[2, 0, 4, 4] = 0
    engine = SparseEngine(graph.data(), force=True)
    assert "Reciprocal" in engine.handed_over and engine.layers == (1, 1)
    found = engine.run(x)
    assert np.isnan(found[2]).all()
    np.testing.assert_allclose(found[:2], reference(graph.data(), x)[0][:2], rtol=1e-5)


def test_a_bundle_that_overflows_abstains(tmp_path: Path) -> None:
    bundle = export(tmp_path, score="msp", carry=["all"], features=False)
    proto = onnx.load_from_string(bundle.model_bytes())
    bias = next(t for t in proto.graph.initializer if t.dims == [64] and t.data_type == 1)
    values = numpy_helper.to_array(bias).copy()
    values[:] = np.where(np.arange(64) % 2, 3e38, -3e38)
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    data = proto.SerializeToString()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    batch = bundle.preprocess.normalise(pixels)
    for name in ("sparse", "onnxruntime"):
        backend = open_backend(data, name)
        outputs = backend.run(batch, -1e30)
        assert not np.isfinite(outputs["score"]).any() and not outputs["accept"].any(), name
        decisions = Predictor(bundle, backend).decide(pixels)
        assert [decision.label for decision in decisions] == [None] * 5
        assert all(decision.score is None and decision.top == () for decision in decisions)
