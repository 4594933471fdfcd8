"""Profiles: every operation counted once, for the right layer, in figures that add up."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moon.errors import UsageError
from moon.runtime.sparse.engine import SparseEngine
from moon.runtime.sparse.plan import Plan
from moon.runtime.sparse.profile import Profile
from moon.runtime.sparse.timing import groups

from .graphs import Graph


def network() -> Graph:
    """A stem, a strided convolution in a frame, a residual, pooling and a linear layer."""
    graph = Graph(3, 17, 17)
    y = graph.add("Relu", graph.conv("x", 8, 3))
    y = graph.conv(y, 8, 8, strides=[2, 2])
    y = graph.add("Relu", graph.add("Add", y, graph.conv(y, 8, 8)))
    y = graph.add("MaxPool", y, kernel_shape=[3, 3], strides=[2, 2])
    y = graph.add("Flatten", graph.add("GlobalAveragePool", y))
    graph.add("Gemm", y, graph.weight(5, 8), graph.weight(5), transB=1)
    return graph


FRAME = Plan(tile=1, together=1, reading="frame", block=72)


def profile(graph: Graph, images: int = 2, **options: object) -> Profile:
    engine = SparseEngine(graph.data(), force=True, **options)  # type: ignore[arg-type]
    return engine.profile(graph.images(images), runs=3)


def test_layers_are_the_networks() -> None:
    found = profile(network(), plans={"t2": FRAME})
    kinds = [(one.kind, one.shape) for one in found.layers]
    assert kinds == [
        ("conv", "3->8 3x3 /1 17x17"),
        ("conv", "8->8 3x3 /2 9x9"),
        ("conv", "8->8 3x3 /1 9x9"),
        ("pool max", "8 3x3 /2 4x4"),
        ("reduce average", "8 1x1"),
        ("flatten", "8"),
        ("linear", "8->5"),
    ]
    assert found.layers[1].name == "n2 (Conv)" and found.layers[1].tensor == "t2"
    assert found.images == 2 and found.runs == 3 and found.handed_over == ""


def test_frames_count_to_their_convolution() -> None:
    found = profile(network(), plans={"t2": FRAME})
    framed, plain = found.layers[1], found.layers[6]
    assert framed.plan == FRAME.to_json()
    assert {"frame_2", "unframe"} < set(framed.kernels)
    assert 0 < framed.around_us < framed.us
    assert plain.around_us == 0 and plain.plan is None


def test_multiply_adds_are_those_of_nonzero_weights() -> None:
    graph = Graph(1, 4, 4)
    weight = np.zeros((2, 1, 3, 3), np.float32)
    weight[0, 0, 1, 1], weight[1, 0, 0, 0], weight[1, 0, 2, 2] = 1, 2, 3
    graph.add("Conv", "x", graph.constant(weight), pads=[1, 1, 1, 1])
    (layer,) = profile(graph, images=5).layers
    assert layer.density == 3 / 18 and layer.macs == 3 * 4 * 4 * 5
    assert layer.gmacs == pytest.approx(layer.macs / layer.us / 1e3)


def test_every_operation_belongs_to_one_layer() -> None:
    graph = network()
    engine = SparseEngine(graph.data(), force=True, plans={"t2": FRAME})
    (program,) = engine.parts[0].programs.values()  # type: ignore[union-attr]
    places = [place for group in groups(program) for place in group.operations]
    assert places == list(range(len(program.operations)))


def test_times_add_up() -> None:
    found = profile(network())
    times = dict(found.times)
    total, run = times.pop("total"), times.pop("run")
    assert total == pytest.approx(sum(times.values())) and run > 0
    parts = times["convolutions"] + times["linear"] + times["frames"] + times["other"]
    assert parts == pytest.approx(sum(one.us for one in found.layers))
    assert times["onnxruntime"] == 0 and times["between"] > 0


def test_a_batch_in_pieces_is_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moon.runtime.sparse.pieces.MOST", 2)
    whole, pieces = Graph(1, 6, 6), 5
    whole.conv("x", 4, 1)
    found = profile(whole, images=pieces)
    (layer,) = found.layers
    assert layer.macs == round((layer.density or 0) * 36) * 36 * pieces
    assert layer.us > 0 and found.images == pieces and found.together == 2


def test_what_is_handed_over_has_its_time() -> None:
    graph = network()
    graph.add("Softmax", "t8", axis=1)
    found = profile(graph)
    assert found.handed_over.startswith("n10 (Softmax)") and found.times["onnxruntime"] > 0
    whole = SparseEngine(unknown(), force=True).profile(np.ones((1, 4), np.float32))
    assert whole.layers == () and whole.limit_gmacs is None and whole.isa == ""
    assert whole.times["onnxruntime"] == pytest.approx(whole.times["total"])


def unknown() -> bytes:
    graph = Graph(4)
    graph.add("Tanh", "x")
    return graph.data()


def test_it_is_json() -> None:
    plain = json.loads(json.dumps(profile(network()).to_json(), allow_nan=False))
    assert plain["schema_version"] == 1 and len(plain["layers"]) == 7
    assert plain["layers"][0]["kernels"] and plain["layers"][3]["gmacs"] is None


def test_results_stay_the_same_and_the_watch_ends() -> None:
    graph, x = network(), network().images(2)
    engine = SparseEngine(graph.data(), force=True)
    before = engine.run(x)
    engine.profile(x, runs=1)
    assert np.array_equal(engine.run(x), before)
    assert engine.machine is not None and engine.machine.watch is None
    with pytest.raises(UsageError, match="Time at least one"):
        engine.profile(x, runs=0)
