"""Whole models: decisions and numbers as ONNX Runtime's, whatever the batch, threads or CPU."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from moon.data.load import load_pixels
from moon.data.preprocess import Preprocess
from moon.data.source import open_source
from moon.errors import BackendError, UsageError
from moon.export import from_onnx
from moon.runtime.sparse.engine import SparseEngine
from moon.runtime.sparse.isa import available
from moon.runtime.sparse.machine import Kernels

from .graphs import Graph, reference
from .test_lower import residual, squeeze_excite, vgg


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small network of random sparse weights, exported with every score, p-values, the gate."""
    folder = tmp_path_factory.mktemp("engine")
    graph = Graph(1, 8, 8)
    y = graph.add("Relu", graph.conv("x", 16, 1))
    y = graph.add("Relu", graph.conv(y, 24, 16, strides=[2, 2]))
    y = graph.add("Relu", graph.add("Add", y, graph.conv(y, 24, 24)))
    y = graph.add("Flatten", graph.add("GlobalAveragePool", y))
    graph.add("Gemm", y, graph.weight(10, 24), graph.weight(10), transB=1)
    model = onnx.load_from_string(graph.data())
    sizes = model.graph.output[0].type.tensor_type.shape.dim
    sizes.add().dim_param, sizes.add().dim_value = "N", 10
    onnx.save(model, folder / "own.onnx")
    from_onnx(
        folder / "own.onnx", folder / "out", classes=[str(i) for i in range(10)],
        data="sklearn:digits#test", fit="sklearn:digits#train", mean=(0.3,), std=(0.4,),
        score="vim", carry=["all"], features=True, p_values=True,
    )  # fmt: skip
    return next((folder / "out").rglob("*.onnx")).read_bytes()


@pytest.fixture(scope="module")
def images() -> NDArray[np.float32]:
    """A hundred, none of which a threshold was set by."""
    pixels = Preprocess(crop=(8, 8), mean=(0.3,), std=(0.4,))
    source = open_source("sklearn:digits#train")
    return pixels.normalise(load_pixels(source, pixels, np.arange(100)))


@pytest.fixture(scope="module")
def small() -> Graph:
    graph = Graph(6, 8, 10)
    residual(graph)
    return graph


def outputs(engine: SparseEngine, x: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    found = engine.run(x)
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 100])
def test_a_model_with_its_score_head_decides_as_onnx_runtime(
    digits: bytes, images: NDArray[np.float32], batch: int
) -> None:
    engine = SparseEngine(digits, threads=2, force=True)
    x = images[:batch]
    wanted = reference(digits, {"input": x})
    names = [output.name for output in onnx.load_from_string(digits).graph.output]
    for name, one, expected in zip(names, outputs(engine, x), wanted, strict=True):
        assert one.shape == expected.shape and one.dtype == expected.dtype
        if expected.dtype.kind in "biu":
            assert np.array_equal(one, expected), name
        elif name.startswith("p_"):
            # A share of some 270 held-out images: a score within rounding of some of theirs, which
            # may be the same for several, is counted with them or without.
            off = np.abs(one - expected)
            assert np.count_nonzero(off) <= 2 and off.max() < 0.02, name
        else:
            np.testing.assert_allclose(one, expected, rtol=1e-3, atol=1e-4, err_msg=name)
    assert {"accept", "label", "p_vim", "score_rmds"} <= set(names)
    engine.close()


def test_the_threshold_can_be_fed(digits: bytes, images: NDArray[np.float32]) -> None:
    engine = SparseEngine(digits, force=True)
    for threshold in (-1e9, 1e9):
        feeds = {"input": images[:5], "threshold": np.array(threshold, np.float32)}
        for one, expected in zip(engine.run(feeds), reference(digits, feeds), strict=True):
            if expected.dtype == bool:
                assert np.array_equal(one, expected)
    with pytest.raises(UsageError, match="the inputs are"):
        engine.run({"input": images[:5], "limit": np.zeros(1, np.float32)})


@pytest.mark.parametrize("build", [residual, squeeze_excite, vgg])
def test_bits_depend_on_nothing_but_the_images(build: object) -> None:
    graph = Graph(6, 8, 10)
    build(graph)  # type: ignore[operator]
    data, x = graph.data(), graph.images(5)
    first = SparseEngine(data, force=True).run(x)
    for threads in (1, 2, 3):
        engine = SparseEngine(data, threads=threads, force=True)
        engine.run(x[::-1] * 100)
        engine.run(x[:3])
        assert np.array_equal(engine.run(x), first)
        engine.close()
    np.testing.assert_allclose(first, reference(data, x)[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("isa", ["avx2", "sse"])
@pytest.mark.parametrize("build", [residual, squeeze_excite])
def test_narrower_instruction_sets_agree(isa: str, build: object) -> None:
    if isa not in available():
        pytest.skip(f"this CPU has no {isa}")
    graph = Graph(6, 8, 10)
    build(graph)  # type: ignore[operator]
    data, x = graph.data(), graph.images(3)
    engine = SparseEngine(data, isa=isa, force=True)
    assert engine.handed_over == ""
    np.testing.assert_allclose(engine.run(x), reference(data, x)[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("guard", ["after", "before"])
@pytest.mark.parametrize("build", [residual, squeeze_excite, vgg])
def test_nothing_is_read_that_nobody_wrote(guard: str, build: object) -> None:
    graph = Graph(6, 8, 10)
    build(graph)  # type: ignore[operator]
    data, x = graph.data(), graph.images(3)
    isa = available()[-1]  # with AVX-512 lanes that are masked never fault
    plain = SparseEngine(data, threads=2, isa=isa, force=True).run(x)
    engine = SparseEngine(data, threads=2, isa=isa, guard=guard, force=True)  # type: ignore[arg-type]
    assert np.array_equal(engine.run(x), plain)


def test_large_batches_are_run_in_parts(small: Graph) -> None:
    engine, x = SparseEngine(small.data(), force=True), small.images(130)
    (part,) = engine._parts
    part._most = 50
    expected = reference(small.data(), x)[0]
    np.testing.assert_allclose(engine.run(x), expected, rtol=2e-5, atol=2e-5)
    assert sorted(part._ready) == [1, 30, 50]
    empty = engine.run(x[:0])
    assert isinstance(empty, np.ndarray) and empty.shape == (0, *expected.shape[1:])


def test_few_programs_are_kept(small: Graph) -> None:
    engine, x = SparseEngine(small.data(), force=True), small.images(8)
    (part,) = engine._parts
    for count in range(1, 9):
        engine.run(x[:count])
    assert list(part._ready) == [5, 6, 7, 8]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_input_that_is_not_finite_is_refused(small: Graph, bad: float) -> None:
    x = small.images()
    x[1, 2, 3, 4] = bad
    with pytest.raises(UsageError, match="NaN or infinite"):
        SparseEngine(small.data(), force=True).run(x)


def test_an_input_of_another_shape_or_type_is_refused(small: Graph) -> None:
    engine, x = SparseEngine(small.data(), force=True), small.images()
    for wrong in (x[:, :1], x[0], x[:, :, :4], x.astype(np.float64), x.astype(">f4")):
        with pytest.raises(UsageError, match=r"the input x must be float32 \[N, 6, 8, 10\],"):
            engine.run(wrong)
    assert np.array_equal(engine.run(x[:, ::-1][:, ::-1]), engine.run(x))


def test_a_model_for_a_number_of_images_takes_no_other() -> None:
    graph = Graph(6, 8, 10, batch=3)
    y = graph.conv("x", 4, 6)
    graph.add("Reshape", y, graph.constant([3, -1], np.int64))
    engine, x = SparseEngine(graph.data(), force=True), graph.images(3)
    assert engine.handed_over == ""
    np.testing.assert_allclose(engine.run(x), reference(graph.data(), x)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="3 images at a time"):
        engine.run(graph.images(2))


@pytest.mark.parametrize("threads", [-1, 5000])
def test_numbers_of_threads_there_cannot_be(small: Graph, threads: int) -> None:
    with pytest.raises(UsageError, match="threads"):
        SparseEngine(small.data(), threads=threads)


def test_several_threads_of_python_share_an_engine(small: Graph) -> None:
    engine, x, wrong = SparseEngine(small.data(), threads=2, force=True), small.images(4), []
    expected = [engine.run(x[: i + 1]) for i in range(4)]

    def call(count: int) -> None:
        for _ in range(30):
            if not np.array_equal(engine.run(x[: count + 1]), expected[count]):
                wrong.append(count)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_can_go_on(digits: bytes, images: NDArray[np.float32]) -> None:
    engine, x = SparseEngine(digits, threads=2, force=True), images[:3]
    expected = outputs(engine, x)
    assert engine._machine is not None
    with engine._machine.lock:  # as if another thread were in the middle of a run
        child = os.fork()
        if not child:
            found = outputs(engine, x)
            os._exit(0 if all(map(np.array_equal, found, expected)) else 1)
    end, done, status = time.monotonic() + 30, 0, 1
    while not done and time.monotonic() < end:
        time.sleep(0.01)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done and status == 0


def test_a_closed_engine_says_so(small: Graph, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(small.data())
    engine = SparseEngine(path, threads=0, force=True)
    assert engine.threads >= 1
    engine.run(small.images())
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        engine.run(small.images())


def test_plans_that_are_given_are_used(small: Graph) -> None:
    data, x = small.data(), small.images(3)
    engine = SparseEngine(data, force=True)
    (part,) = engine._parts
    assert isinstance(part, Kernels)
    program = part._ready[1].program
    chosen = {made: conv.plan for made, (conv, _) in program.convolutions.items()}
    others = {made: replace(plan, tile=1) for made, plan in chosen.items()}
    assert others != chosen
    planned = SparseEngine(data, force=True, plans=others)
    (part,) = planned._parts
    assert isinstance(part, Kernels)
    taken = [conv.plan for conv, _ in part._ready[1].program.convolutions.values()]
    assert set(taken) & set(others.values()) - set(chosen.values())
    np.testing.assert_allclose(planned.run(x), engine.run(x), rtol=2e-5, atol=2e-5)


def test_what_is_returned_is_the_callers_own() -> None:
    graph = Graph(6, 8, 10)
    fixed = graph.constant(np.ones((2, 3)))
    y = graph.add("Relu", graph.conv("x", 4, 6))
    engine, x = SparseEngine(graph.data(y, "x", fixed), force=True), graph.images(2)
    assert engine.outputs == (y, "x", fixed) and engine.isa in available()
    for _ in range(2):
        found = outputs(engine, x)
        assert np.array_equal(found[1], x) and found[1] is not x
        assert np.array_equal(found[2], np.ones((2, 3)))
        np.testing.assert_allclose(found[0], reference(graph.data(y), x)[0], rtol=1e-4, atol=1e-5)
        for one in found:
            one[...] = 7


def test_nothing_spins_between_calls(digits: bytes, images: NDArray[np.float32]) -> None:
    engine = SparseEngine(digits, threads=2, force=True)
    outputs(engine, images)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
    engine.close()
