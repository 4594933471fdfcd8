"""Sizes, numbers and attributes at which something could overflow, alias or be read as another."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from moon.errors import BackendError
from moon.runtime.sparse.fuse import fuse
from moon.runtime.sparse.isa import available
from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.lower import lower
from moon.runtime.sparse.memory import Reach, aligned
from moon.runtime.sparse.model import read_model

from .graphs import Graph, lowered, opened, reference
from .scripts import script
from .test_lower import agree


@pytest.mark.parametrize(
    "shape", [(1 << 63, 2, 40), (1 << 62, 1, 4), (1 << 28, 1, 1), (1 << 14, 1 << 14, 1), (5, 0, 5)]
)
def test_an_input_larger_than_any_memory_is_refused(shape: tuple[int, ...]) -> None:
    small = Graph(1, 1, 1)
    small.add("Relu", "x")
    given = Planes(shape[0], 1, shape[1], shape[2])
    with pytest.raises(BackendError, match="larger than 1 GiB"):
        lower(read_model(small.data()), "x", given)
    if max(shape) < 1 << 63:
        graph = Graph(*shape)
        graph.add("Relu", "x")
        with suppress(BackendError):  # unless all is left to ONNX Runtime
            opened(graph.data())


def test_planes_of_one_pixel_count_as_they_lie_in_memory() -> None:
    graph = Graph(1 << 16, 1, 1)
    y = "x"
    for _ in range(3):
        y = graph.add("Concat", *[y] * 16, axis=1)
    # 2^28 numbers, but sixteen times that in memory.
    assert "larger than 1 GiB" in lowered(graph).first


def test_a_fixed_number_of_images_counts() -> None:
    graph = Graph(16, 256, 256, batch=1000)
    graph.add("Concat", "x", "x", axis=1)
    with pytest.raises(BackendError, match="larger than 1 GiB"):
        lowered(graph, images=1000, fixed=True)
    assert lowered(graph).first == ""


@pytest.mark.parametrize(
    "attributes",
    [
        {"dilations": [1 << 19, 1], "pads": [1 << 19, 1, 1 << 19, 1]},
        {"dilations": [1, 1 << 18], "pads": [1, 1 << 18, 1, 1 << 18]},
        {"dilations": [1 << 19, 1], "pads": [0, 1, (1 << 20) - 1, 1]},
    ],
)
def test_a_window_far_beyond_the_image_asks_for_no_memory(attributes: dict[str, Any]) -> None:
    graph = Graph(1, 1, 1000)
    graph.conv("x", 1, 1, **attributes)
    assert "too far" in lowered(graph).first or lowered(graph).steps
    try:
        found = opened(graph.data()).run(graph.images(1))
    except BackendError:  # where ONNX Runtime refuses it, too
        return
    np.testing.assert_allclose(found, reference(graph.data(), graph.images(1))[0], rtol=1e-5)


def test_a_large_window_on_a_batch_does_not_run_out_of_memory() -> None:
    """16 MB of images; the indices of all their windows would take a gigabyte and more."""
    script("""
import resource
from pathlib import Path
from tests.runtime.sparse.graphs import Graph
graph = Graph(1, 512, 512)
graph.add("MaxPool", "x", kernel_shape=[8, 8])
engine = engaged(graph.data())
engine.run(graph.images(1))
used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29),) * 2)
engine.run(graph.images(16))
""")


def test_memory_that_there_is_not_is_an_error_of_ours() -> None:
    for size in (1 << 60, 1 << 70):
        with pytest.raises(BackendError, match="no memory"):
            aligned(size, Reach(1 << 20, 0))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("where", ["weight", "bias", "matrix", "offset"])
def test_weights_that_are_not_finite_are_left(where: str, bad: float) -> None:
    graph = Graph(2, 5, 5)
    weight, bias = np.zeros((3, 2, 3, 3)), np.zeros(3)
    matrix, offset = np.zeros((75, 4)), np.zeros(4)
    for name, one in (("weight", weight), ("bias", bias), ("matrix", matrix), ("offset", offset)):
        if name == where:
            one.flat[0] = bad
    y = graph.add("Conv", "x", graph.constant(weight), graph.constant(bias), pads=[1] * 4)
    y = graph.add("Flatten", y)
    graph.add("Gemm", y, graph.constant(matrix), graph.constant(offset))
    assert "NaN or infinite" in lowered(graph).first
    found = opened(graph.data()).run(graph.images(2))
    np.testing.assert_array_equal(found, reference(graph.data(), graph.images(2))[0])


def test_a_norm_that_would_overflow_weights_is_not_fused() -> None:
    graph = Graph(1, 2, 2)
    y = graph.add("Conv", "x", graph.constant(np.full((1, 1, 1, 1), 1e30)))
    graph.add("Mul", y, graph.constant(1e30))
    found = lowered(graph).steps
    assert len(found) == 2 and fuse(found, frozenset()) == list(found)
    x = graph.images(1) * np.float32(1e-30)
    wanted = x.astype(np.float64) * 1e60
    np.testing.assert_allclose(opened(graph.data()).run(x), wanted, rtol=1e-6)


def test_numbers_of_bfloat16_are_left() -> None:
    graph = Graph(2, 4, 4)
    graph.conv("x", 3, 2)
    model = onnx.load_from_string(graph.data())
    weight = model.graph.initializer[0]
    weight.data_type = onnx.TensorProto.BFLOAT16
    weight.raw_data = weight.raw_data[: len(weight.raw_data) // 2]
    found = lower(read_model(model.SerializeToString()), "x", Planes(2, 1, 4, 4))
    assert "bfloat16" in found.first


@pytest.mark.parametrize("value", [2, -1])
@pytest.mark.parametrize(
    "op, name",
    [("ReduceMean", "keepdims"), ("Gemm", "transB"), ("Gemm", "transA"), ("MaxPool", "ceil_mode"),
     ("AveragePool", "count_include_pad"), ("Reshape", "allowzero")],
)  # fmt: skip
def test_switches_are_on_or_off(op: str, name: str, value: int) -> None:
    graph = Graph(2, 4, 4)
    y = graph.add("Flatten", "x") if op == "Gemm" else "x"
    more: dict[str, list[str]] = {
        "ReduceMean": [graph.constant([2, 3], np.int64)],
        "Gemm": [graph.weight(32, 32)],
        "Reshape": [graph.constant([0, -1], np.int64)],
    }
    window = {"kernel_shape": [2, 2]} if op.endswith("Pool") else {}
    graph.add(op, y, *more.get(op, []), **{name: value}, **window)
    assert f"its {name} is not 0 or 1" in lowered(graph).first


@pytest.mark.parametrize("op", ["Conv", "MaxPool"])
def test_attributes_of_another_type_are_left(op: str) -> None:
    graph = Graph(2, 4, 4)
    if op == "Conv":
        graph.conv("x", 3, 2)
    else:
        graph.add(op, "x", kernel_shape=[3, 3])
    tensor = helper.make_tensor("t", onnx.TensorProto.FLOAT, [2], [1, 2])
    for name in ("auto_pad", "strides", "dilations", "kernel_shape", "group", "ceil_mode"):
        model = onnx.load_from_string(graph.data())
        node = model.graph.node[0]
        kept = [one for one in node.attribute if one.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, tensor)])
        found = lower(read_model(model.SerializeToString()), "x", Planes(2, 1, 4, 4))
        used = (op, name) not in (("Conv", "ceil_mode"), ("MaxPool", "group"))
        assert bool(found.first) == used, name


def test_windows_in_the_padding_and_paddings_below_nothing_are_left() -> None:
    for op, why, attributes in (
        ("MaxPool", "in the padding", {"dilations": [5, 1], "pads": [1, 0, 1, 0]}),
        ("AveragePool", "in the padding", {"dilations": [5, 1], "pads": [1, 0, 1, 0]}),
        ("MaxPool", "dilated and pads", {"dilations": [2, 1], "auto_pad": "SAME_UPPER"}),
        ("MaxPool", "less than nothing", {"strides": [4, 1], "auto_pad": "SAME_LOWER"}),
    ):
        graph = Graph(2, 4 if "strides" in attributes else 5, 4)
        graph.add(op, "x", kernel_shape=[2, 1], **attributes)
        if why == "in the padding":
            graph = Graph(2, 1, 4)
            pads = [3, 0, 3, 0]
            graph.add(op, "x", kernel_shape=[2, 1], dilations=[5, 1], pads=pads)
        assert why in lowered(graph).first, (op, lowered(graph).first)


def test_an_output_that_is_named_twice_is_given_twice() -> None:
    graph = Graph(2, 4, 4)
    y = graph.add("Relu", graph.conv("x", 3, 2))
    agree(graph, y, y)


@pytest.mark.parametrize("rows", [1, 3, 5, 70])
def test_long_rows_of_nonzeros(rows: int) -> None:
    """More groups in a row than fit sixteen bits, were they not in blocks."""
    graph = Graph(40_000, 1, 1)
    graph.add("Conv", "x", graph.weight(rows, 40_000, 1, 1, density=0.9 if rows < 9 else 0.001))
    agree(graph)


def test_a_graph_of_very_many_nodes_is_left_from_somewhere_on() -> None:
    graph = Graph(2, 4, 4)
    y = "x"
    for _ in range(6000):
        y = graph.add("Sigmoid", y)
    found = lowered(graph)
    assert len(found.steps) == 5000 and "too many before it" in found.first
    assert len(found.rest) == 1000


@pytest.mark.parametrize("size", [(20, 20), (8, 32), (33, 16)])
@pytest.mark.parametrize("density", [0.02, 0.4])
def test_many_channels_in_several_blocks(size: tuple[int, int], density: float) -> None:
    graph = Graph(600, *size)
    weight = graph.weight(9, 600, 3, 3, density=density)
    y = graph.add("Conv", "x", weight, graph.weight(9), pads=[1] * 4)
    graph.add("Conv", "x", graph.weight(5, 600, 3, 3, density=density), strides=[2, 2])
    agree(graph, y, "t1")


@pytest.mark.parametrize("isa", available())
def test_a_kernel_larger_than_its_image(isa: str) -> None:
    graph = Graph(3, 5, 33)
    y = graph.conv("x", 4, 3, 41)
    graph.conv(y, 2, 4, 31, strides=[2, 1])
    data, x = graph.data(), graph.images(2)
    found = opened(data, isa=isa, threads=2).run(x)
    np.testing.assert_allclose(found, reference(data, x)[0], rtol=1e-4, atol=1e-5)


def test_a_result_never_lies_where_its_step_still_reads() -> None:
    """Long chains in which places are taken again at once, with readers far behind."""
    graph = Graph(5, 9, 11)
    y = first = graph.add("Relu", graph.conv("x", 5, 5))
    kept = []
    for i in range(12):
        z = graph.add("Relu", graph.conv(y, 5, 5))
        y = graph.add("Add", z, y) if i % 3 else graph.add("Mul", z, first)
        if i % 4 == 0:
            kept.append(graph.add("MaxPool", y, kernel_shape=[3, 3], pads=[1] * 4))
    agree(graph, graph.add("Concat", y, *kept, first, axis=1), kept[0], "t1")
