"""Inputs that may be fed: by the engine and by ONNX Runtime, used or not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from moon.errors import UsageError
from moon.runtime import SparseEngine

from .graphs import Graph, opened, reference


def limited(*shape: int | str, read: bool = False) -> tuple[bytes, str]:
    """A graph with an input that may be fed, which is an output, too, and may be read."""
    graph = Graph(1, 2, 2)
    y, limit = graph.add("Relu", "x"), graph.constant(np.full([1] * len(shape), 0.5))
    if read:
        graph.add("Add", y, limit)
    model = onnx.load_from_string(graph.data())
    value = helper.make_tensor_value_info(limit, onnx.TensorProto.FLOAT, shape)
    model.graph.input.append(value)
    model.graph.output.append(value)
    return model.SerializeToString(), limit


X = np.ones((1, 1, 2, 2), np.float32)


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("read", [True, False])
def test_what_was_fed_can_be_an_output(read: bool, force: bool) -> None:
    data, limit = limited(read=read)
    engine = opened(data, force=force)
    assert (engine.isa != "") == force and engine.optional == {limit}
    for number in (9, np.nan, np.inf):
        feeds = {"x": X, limit: np.array(number, np.float32)}
        found = engine.run(feeds)
        for one, other in zip(found, reference(data, feeds), strict=True):
            assert np.array_equal(one, other, equal_nan=True)
        assert found[1] is not feeds[limit]
    assert engine.run(X)[1] == 0.5


WRONG = [np.zeros(3, np.float32), np.zeros((1, 1, 1), np.float32), np.array(1.0), "text", None]


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("value", WRONG, ids=str)
def test_another_type_or_shape_is_refused(value: object, read: bool, force: bool) -> None:
    data, limit = limited(1, 1, read=read)
    with pytest.raises(UsageError, match=rf"the input {limit} must be float32 \[1, 1\], not "):
        opened(data, force=force).run({"x": X, limit: value})  # type: ignore[dict-item]


def test_a_number_is_no_list() -> None:
    data, limit = limited()
    with pytest.raises(UsageError, match=rf"the input {limit} must be float32 \[\], not "):
        opened(data).run({"x": X, limit: np.zeros(1, np.float32)})


@pytest.mark.parametrize("force", [True, False])
def test_a_size_that_varies(force: bool) -> None:
    data, limit = limited("M", read=True)
    engine = SparseEngine(data, force=force)
    assert (engine.isa != "") == force
    for count in (1, 2):
        feeds = {"x": X, limit: np.arange(count, dtype=np.float32)}
        for one, other in zip(engine.run(feeds), reference(data, feeds), strict=True):
            assert np.array_equal(one, other)
    with pytest.raises(UsageError, match=rf"the input {limit} must be float32 \[\?\], not "):
        engine.run({"x": X, limit: np.zeros((1, 1), np.float32)})
