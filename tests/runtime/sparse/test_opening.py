"""Models the engine cannot run, or not faster: handed over whole, with the reason, or refused."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moon.errors import BackendError, MissingExtraError, UsageError
from moon.runtime import SparseEngine
from moon.runtime.sparse import isa, opening

from .graphs import Graph, reference
from .test_division import middle

pytestmark = pytest.mark.usefixtures("small_pays")


def wide(density: float = 0.4, *, batch: int | str = "N") -> Graph:
    """One convolution of a million multiply-adds and more."""
    graph = Graph(16, 16, 32, batch=batch)
    weight = graph.weight(32, 16, 3, 3, density=density)
    graph.add("Conv", "x", weight, pads=[1] * 4)
    return graph


def model(
    nodes: list[Any], inputs: list[Any], tensors: dict[str, Any] | None = None, **more: Any
) -> onnx.ModelProto:
    made = [numpy_helper.from_array(value, name) for name, value in (tensors or {}).items()]
    outputs = [onnx.ValueInfoProto(name=nodes[-1].output[0])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, made)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, **more)


def value(name: str, kind: int, *shape: int | str | None) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


F, U8, I64 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT64
SQUARE = np.random.default_rng(0).normal(size=(3, 3, 3, 3)).astype(np.float32)
CONV = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)
X = np.random.default_rng(1).random((2, 3, 6, 5), np.float32)


def half() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["h", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    return model(nodes, [value("x", F, "N", 3, 6, 5)], {"w": SQUARE.astype(np.float16)})


def local() -> onnx.ModelProto:
    body = [helper.make_node("Relu", ["a"], ["b"])]
    function = helper.make_function(
        "own", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 20)]
    )
    node = helper.make_node("Twice", ["x"], ["y"], domain="own")
    return model([node], [value("x", F, "N", 3, 6, 5)], functions=[function])


# What it is -> the model, what it is fed, and what is said.
WHOLE: dict[str, tuple[Callable[[], onnx.ModelProto], Any, str]] = {
    "two inputs": (
        lambda: model(
            [helper.make_node("Add", ["x", "z"], ["y"])],
            [value("x", F, "N", 3, 6, 5), value("z", F, "N", 3, 6, 5)],
        ),
        {"x": X, "z": X}, "it has 2 inputs",
    ),
    "any size": (
        lambda: model([CONV], [value("x", F, "N", 3, "H", "W")], {"w": SQUARE}),
        X, "the sizes of the input x vary",
    ),
    "no image": (
        lambda: model([helper.make_node("Relu", ["x"], ["y"])], [value("x", F, "N", 7)]),
        X.reshape(2, -1)[:, :7], r"n?.*Relu.: the input is float32 \[N, 7\]",
    ),
    "whole numbers": (
        lambda: model([helper.make_node("Neg", ["x"], ["y"])], [value("x", I64, "N", 2)]),
        np.int64([[1, 2]]), "the input is int64",
    ),
    "float16 inside": (half, X, r"Conv.: it computes in float16"),
    "a local function": (local, X, "local functions"),
    "no convolution": (
        lambda: model([helper.make_node("Relu", ["x"], ["y"])], [value("x", F, "N", 3, 6, 5)]),
        X, "no convolution that the engine runs",
    ),
    "no nodes": (
        lambda: model(
            [helper.make_node("Identity", ["x"], ["y"])], [value("x", F, "N", 3, 6, 5)]
        ),
        X, "no convolution",
    ),
    "no images": (
        lambda: model([helper.make_node("Relu", ["x"], ["y"])], [value("x", F, 0, 3, 6, 5)]),
        X[:0], "vary, or are zero",
    ),
    "small": (
        lambda: model([CONV], [value("x", F, "N", 3, 6, 5)], {"w": np.triu(SQUARE)}),
        X, "saves only [0-9,]* multiply-adds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_models_that_are_handed_over_whole(case: str) -> None:
    build, feeds, why = WHOLE[case]
    data, told = build().SerializeToString(), []
    engine = SparseEngine(data, threads=1, warn=told.append)
    assert engine.isa == "" and engine.layers == (0, 0)
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(engine.handed_over)
    assert engine.handed_over.startswith("the whole model: ")
    assert told == [f"ONNX Runtime runs {engine.handed_over}"]
    found = engine.run(feeds)
    assert np.array_equal(found, reference(data, feeds)[0])


def test_a_dense_model_is_handed_over_unless_forced() -> None:
    data = wide(density=0.9).data()
    assert "90% of its multiply-adds are left" in SparseEngine(data).handed_over
    assert SparseEngine(data, force=True).handed_over == ""
    assert SparseEngine(wide(density=0.5).data()).handed_over == ""


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("force", [False, True])
def test_weights_that_are_not_finite(bad: float, force: bool) -> None:
    graph = Graph(16, 16, 32)
    weight = np.zeros((32, 16, 3, 3), np.float32)
    weight[3, 2, 1, 1] = bad
    y = graph.add("Conv", "x", graph.constant(weight), pads=[1] * 4)
    graph.add("Relu", y)
    engine = SparseEngine(graph.data(), force=force)
    assert engine.handed_over == "the whole model: n0 (Conv): a weight is NaN or infinite"
    assert not np.isfinite(engine.run(graph.images())).all()


def test_values_in_a_file_beside_it(tmp_path: Path) -> None:
    proto = onnx.load_from_string(wide().data())
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin",
              size_threshold=0)  # fmt: skip
    engine = SparseEngine(tmp_path / "m.onnx")
    assert "are in another file" in engine.handed_over
    x = wide().images()
    assert np.array_equal(engine.run(x), reference(wide().data(), x)[0])
    with pytest.raises(BackendError, match="are in another file; ONNX Runtime cannot load"):
        SparseEngine((tmp_path / "m.onnx").read_bytes())


def test_a_file_of_gigabytes_is_not_read_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_MOST_FILE", 1000)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("read"))
    path = tmp_path / "m.onnx"
    path.write_bytes(wide().data())
    engine = SparseEngine(path)
    assert "its file is larger than 2 GiB" in engine.handed_over
    x = wide().images()
    np.testing.assert_array_equal(engine.run(x), reference(wide().data(), x)[0])


@pytest.mark.parametrize("data", [b"", b"not a model", wide().data()[:-50]])
def test_a_damaged_file_is_refused_with_both_reasons(data: bytes, tmp_path: Path) -> None:
    for given in (data, tmp_path / "m.onnx"):
        (tmp_path / "m.onnx").write_bytes(data)
        with pytest.raises(
            BackendError, match=r"is damaged: .*; ONNX Runtime cannot load.*Take a good copy"
        ):
            SparseEngine(given)


def test_what_onnx_runtime_refuses_is_refused() -> None:
    graph = wide()
    graph.add("NoSuchOperator", "t0")
    with pytest.raises(BackendError, match=r"ONNX Runtime cannot load the model: .*NoSuchOp"):
        SparseEngine(graph.data())


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(BackendError, match=rf"could not read {path}: .*Check the path"):
            SparseEngine(path)


def test_a_system_it_was_not_verified_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening.platform, "machine", lambda: "aarch64")
    engine = SparseEngine(wide().data())
    assert engine.handed_over.endswith("the engine is not verified on Linux aarch64")
    assert SparseEngine(wide().data(), force=True).handed_over == ""


def test_a_system_that_forbids_new_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid() -> None:
        raise BackendError("the sparse CPU engine cannot make code on this system: denied")

    monkeypatch.setattr(opening, "llvm", forbid)
    assert "cannot make code on this system" in SparseEngine(wide().data()).handed_over


def test_without_llvmlite_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    isa.llvm.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "llvmlite", None)
    with pytest.raises(MissingExtraError, match=r"llvmlite.*moon-toolkit\[engine\]"):
        SparseEngine(wide().data())
    isa.llvm.cache_clear()


def test_convolutions_that_are_left_are_told_of() -> None:
    graph = Graph(16, 16, 32)
    y = graph.add("Softplus", graph.conv("x", 24, 16))
    graph.add("Conv", y, graph.weight(24, 1, 1, 1), group=24)
    told: list[str] = []
    SparseEngine(graph.data(), warn=told.append)
    assert told == [
        "ONNX Runtime runs 1 of the convolutions; n1 (Softplus): the operator is not known"
    ]
    told.clear()
    quiet = Graph(16, 16, 32)
    middle(quiet)
    SparseEngine(quiet.data(), warn=told.append)
    assert told == []


def test_more_threads_than_cores_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("moon.runtime.sparse.engine.usable_cores", lambda: 2)
    engine = SparseEngine(wide().data(), threads=3, warn=told.append)
    assert told == ["3 threads share 2 usable cores, and wait for each other"]
    assert engine.threads == 3 and SparseEngine(wide().data(), threads=0).threads == 2
    x = wide().images()
    np.testing.assert_allclose(engine.run(x), reference(wide().data(), x)[0], rtol=1e-4, atol=1e-5)


def test_inputs_by_name() -> None:
    build, feeds, _ = WHOLE["two inputs"]
    engine = SparseEngine(build().SerializeToString())
    with pytest.raises(UsageError, match=r"2 inputs: x, z.*dict"):
        engine.run(X)
    for wrong in ({"x": X}, {**feeds, "q": X}, {}):
        with pytest.raises(UsageError, match="the inputs are x, z, not"):
            engine.run(wrong)
    with pytest.raises(UsageError, match="the input z holds NaN"):
        engine.run({"x": X, "z": np.full_like(X, np.nan)})
    with pytest.raises(UsageError, match=r"the input z must be float32 \[N, 3, 6, 5\]"):
        engine.run({"x": X, "z": X[:, :2]})


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_whole_model_goes_on_in_a_forked_child(tmp_path: Path) -> None:
    build, feeds, _ = WHOLE["any size"]
    engine = SparseEngine(build().SerializeToString(), threads=2)
    expected = engine.run(feeds)
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(engine.run(feeds), expected) else 1)
    end, done, status = time.monotonic() + 30, 0, 1
    while not done and time.monotonic() < end:
        time.sleep(0.01)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done and status == 0


def test_a_closed_engine_says_so() -> None:
    build, feeds, _ = WHOLE["small"]
    engine = SparseEngine(build().SerializeToString())
    engine.run(feeds)
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        engine.run(feeds)
