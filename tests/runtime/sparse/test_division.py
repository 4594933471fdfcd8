"""Which runtime runs which nodes, and that together they compute what the graph says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from moon.runtime.sparse.division import Foreign, Native, divide
from moon.runtime.sparse.engine import SparseEngine
from moon.runtime.sparse.fold import fold
from moon.runtime.sparse.model import read_model
from moon.runtime.sparse.probe import probe

from .graphs import Graph, reference

Build = Callable[[Graph], object]

pytestmark = pytest.mark.usefixtures("small_pays")


def pad_first(g: Graph) -> None:
    wide = g.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
    g.add("Relu", g.conv(g.add("Pad", "x", wide), 24, 16, pads=[0] * 4))


def middle(g: Graph) -> None:
    y = g.add("Softplus", g.conv("x", 24, 16))
    y = g.add("GlobalAveragePool", g.conv(y, 24, 24))
    g.add("Erf", g.add("Flatten", y))


def skip(g: Graph) -> None:
    """What one part makes, a part after the next one reads."""
    y = g.add("Relu", g.conv("x", 16, 16))
    z = g.conv(g.add("Erf", y), 16, 16)
    g.conv(g.add("Tanh", g.add("Add", y, z)), 16, 16)


def branches(g: Graph) -> None:
    y = g.conv(g.add("Softplus", "x"), 16, 16)
    g.add("Add", y, g.conv(g.add("Erf", "x"), 16, 16))


def turned(g: Graph) -> None:
    """Images come out of what was rows."""
    y = g.add("Reshape", "x", g.constant([0, 32, 16, 16], np.int64))
    g.conv(y, 64, 32)


def instances(g: Graph) -> None:
    y = g.conv(g.add("InstanceNormalization", "x", g.weight(16), g.weight(16)), 48, 16, 5)
    g.add("Sub", y, g.add("Mul", y, y))


CASES: dict[str, tuple[Build, str]] = {
    "pad first": (pad_first, "FN"),
    "middle": (middle, "NFNF"),
    "skip": (skip, "NFNFN"),
    "branches": (branches, "FNFNF"),
    "turned": (turned, "FN"),
    "instances": (instances, "FNF"),
}


@pytest.mark.parametrize("batch", ["N", 2])
@pytest.mark.parametrize("case", CASES)
def test_parts_run_one_after_the_other(case: str, batch: int | str) -> None:
    build, letters = CASES[case]
    graph = Graph(16, 16, 32, batch=batch)
    build(graph)
    division = divide(fold(read_model(graph.data())))
    assert "".join(type(part).__name__[0] for part in division.parts) == letters
    x = graph.images(2)
    engine = SparseEngine(graph.data())
    assert engine.handed_over == division.first != "" and engine.isa
    expected = reference(graph.data(), x)[0]
    np.testing.assert_allclose(engine.run(x), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("batch", ["N", 2])
@pytest.mark.parametrize("case", CASES)
def test_what_a_part_reads_has_a_shape(case: str, batch: int | str) -> None:
    """So that ONNX Runtime checks it before it runs."""
    graph = Graph(16, 16, 32, batch=batch)
    CASES[case][0](graph)
    for part in divide(fold(read_model(graph.data()))).parts:
        for value in part.inputs if isinstance(part, Foreign) else ():
            assert value.shape is not None and len(value.shape) in (2, 4)
            assert value.shape[0] in (batch, None)
            assert all(isinstance(size, int) for size in value.shape[1:])


@pytest.mark.parametrize("count", [0, 1, 70])
def test_any_number_of_images_goes_through_all_parts(count: int) -> None:
    graph = Graph(16, 16, 32)
    middle(graph)
    x = graph.images(count)
    found, expected = SparseEngine(graph.data()).run(x), reference(graph.data(), x)[0]
    assert isinstance(found, np.ndarray) and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_a_part_that_does_not_pay_is_left() -> None:
    graph = Graph(16, 16, 32)
    y = graph.add("Softplus", graph.conv("x", 24, 16))
    graph.add("Conv", y, graph.weight(24, 1, 1, 1), group=24)  # nothing of it is zero
    model = fold(read_model(graph.data()))
    division = divide(model)
    assert [type(part) for part in division.parts] == [Native, Foreign]
    assert division.convolutions_left == 1 and division.layers == 1
    forced = divide(model, force=True)
    assert [type(part) for part in forced.parts] == [Native, Foreign, Native]
    assert forced.convolutions_left == 0 and forced.layers == 2


def test_the_first_node_that_is_left_is_named() -> None:
    graph = Graph(16, 16, 32)
    middle(graph)
    first = divide(fold(read_model(graph.data()))).first
    assert first == "n1 (Softplus): the operator is not known"


def test_shapes_inside_a_graph() -> None:
    graph = Graph(16, 16, 32)
    pad = graph.add("Pad", "x", graph.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    rows = graph.add("Reshape", pad, graph.constant([-1, 34], np.int64))
    flat = graph.add("Reshape", pad, graph.constant([-1, 16, 18 * 34], np.int64))
    sizes = graph.add("Shape", pad)
    names = [pad, rows, flat, sizes]
    found = {value.name: value for value in probe(read_model(graph.data(pad)), names, None)}
    assert found[pad].shape == (None, 16, 18, 34) and found[pad].dtype == np.float32
    assert found[rows].shape is None  # its first size follows the images and is not their number
    assert found[flat].shape == (None, 16, 18 * 34)
    assert found[sizes].shape is None and found[sizes].dtype == np.int64
    fixed = Graph(16, 16, 32, batch=3)
    pad = fixed.add("Pad", "x", fixed.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    (value,) = probe(read_model(fixed.data()), [pad], 3)
    assert value.shape == (3, 16, 18, 34)


def drawn(seed: int) -> Graph:
    """A dozen random nodes of which the engine knows some, each reading any made before."""
    draw = np.random.default_rng(seed)
    graph = Graph(4, 6, 7, batch="N" if seed % 3 else 3)
    made = ["x"]
    for _ in range(12):
        y = made[draw.integers(max(0, len(made) - 4), len(made))]
        kind = draw.integers(8)
        if kind < 3:
            made.append(graph.conv(y, 4, 4, int(draw.choice([1, 3]))))
        elif kind == 3:
            made.append(graph.add("Add", y, made[draw.integers(len(made))]))
        elif kind == 4:
            made.append(graph.add("Relu", y))
        elif kind == 5:
            made.append(graph.add("Transpose", graph.add("Transpose", y, perm=[0, 1, 3, 2]),
                                  perm=[0, 1, 3, 2]))  # fmt: skip
        elif kind == 6:
            made.append(graph.add("Softplus", y))
        else:
            halves = graph.add("Split", y, axis=1, num_outputs=2, outputs=2)
            made.append(graph.add("Concat", halves, f"{halves}_1", axis=1))
    return graph


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs_are_computed_right(seed: int) -> None:
    graph = drawn(seed)
    last = len(graph._nodes)
    outputs = {graph._nodes[i].output[0] for i in (last - 1, last // 2, last // 3)}
    data, x = graph.data(*sorted(outputs)), graph.images(3)
    found = SparseEngine(data, force=True).run(x)
    for one, expected in zip(
        found if isinstance(found, list) else [found], reference(data, x), strict=True
    ):
        np.testing.assert_allclose(one, expected, rtol=1e-3, atol=1e-3)
