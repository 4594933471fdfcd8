"""Every kernel beside the convolution against numpy, through programs of one step."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from moon.runtime.sparse import steps as st
from moon.runtime.sparse.costs import Costs
from moon.runtime.sparse.frame import Frame
from moon.runtime.sparse.geometry import Geometry, Window
from moon.runtime.sparse.jit import Jit
from moon.runtime.sparse.kernels import PLANE_KERNELS
from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.memory import Space
from moon.runtime.sparse.program import Program

Floats = NDArray[np.float32]
Kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
NAMES = {"source": "x", "target": "y", "node": "n"}
# Images, channels, height, width: whole vectors, odd ones, one pixel.
SHAPES = [(1, 3, 4, 8), (3, 5, 7, 5), (2, 4, 1, 1), (1, 2, 16, 17)]
USED: set[str] = set()


def run(
    jit: Jit, x: Floats, out: st.Tensor, *steps: st.Step, threads: int = 2, guard: str = "after"
) -> Floats:
    """``y`` of steps on the planes ``x``, beside pages that fault; threads after each other."""
    images, channels, height, width = x.shape
    tensors: dict[str, st.Tensor] = {"x": Planes(channels, images, height, width), "y": out}
    tensors |= {step.target: tensors["x"] for step in steps if step.target not in tensors}
    space = Space(guard)  # type: ignore[arg-type]
    program = Program(steps, tensors, "x", ["y"], Costs(), threads, space=space)
    program.feed(x)
    found = jit.addresses({one.kernel: one.build for one in program.operations})
    for one in program.operations:
        USED.add(one.kernel)
        for thread in range(threads):
            Kernel(found[one.kernel])(one.record.address, thread, threads)
    return program.result("y").copy()


def same(planes: Sequence[int]) -> Planes:
    return Planes(planes[1], planes[0], planes[2], planes[3])


def values(shape: Sequence[int], seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def window_values(x: Floats, window: Window, fill: float, out: Planes) -> Floats:
    """[taps, images, channels, height, width], padding as ``fill``."""
    top, left, bottom, right = window.pads
    more = ((0, 0), (0, 0), (top, bottom + 9), (left, right + 9))
    padded = np.pad(x, more, constant_values=fill)
    sy, sx = window.strides
    found = []
    for i in range(window.kernel[0]):
        for j in range(window.kernel[1]):
            part = padded[:, :, i * window.dilations[0] :: sy, j * window.dilations[1] :: sx]
            found.append(part[:, :, : out.height, : out.width])
    return np.stack(found)


WINDOWS = [
    Window((3, 3), (2, 2), pads=(1, 1, 1, 1)),
    Window((2, 2), (2, 2)),
    Window((3, 2), (1, 2), (2, 1), (1, 0, 2, 1)),
    Window((1, 1), (3, 1)),
]


@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[3:])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("ceil", [False, True])
def test_pooling(jit: Jit, shape: tuple[int, ...], window: Window, ceil: bool) -> None:
    x = values(shape)
    height, width = window.output(*shape[2:], ceil=ceil)
    out = Planes(shape[1], shape[0], height, width)
    got = run(jit, x, out, st.Pool(**NAMES, kind="max", window=window))
    assert np.array_equal(got, window_values(x, window, -np.inf, out).max(0))
    got = run(jit, x, out, st.Pool(**NAMES, kind="average", window=window))
    expected = np.nanmean(window_values(x, window, np.nan, out).astype(np.float64), 0)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    if not ceil:
        step = st.Pool(**NAMES, kind="average", window=window, padding_counts=True)
        expected = window_values(x, window, 0, out).astype(np.float64).mean(0)
        np.testing.assert_allclose(run(jit, x, out, step), expected, rtol=1e-5, atol=1e-6)


def test_pooling_passes_nan_and_infinity_on(jit: Jit) -> None:
    x = values((1, 1, 4, 6))
    x[0, 0, 0, 0], x[0, 0, 0, 2], x[0, 0, 2, 5] = np.nan, np.inf, -np.inf
    x[0, 0, 3, 3] = np.nan
    x[0, 0, 2:, 4:] = -np.inf
    window, out = Window((2, 2), (2, 2)), Planes(1, 1, 2, 3)
    got = run(jit, x, out, st.Pool(**NAMES, kind="max", window=window))[0, 0]
    assert np.isnan([got[0, 0], got[1, 1]]).all()
    assert got[0, 1] == np.inf and got[1, 2] == -np.inf
    assert np.isfinite([got[0, 2], got[1, 0]]).all()
    average = run(jit, x, out, st.Pool(**NAMES, kind="average", window=window))[0, 0]
    assert np.isnan([average[0, 0], average[1, 1]]).all()
    assert average[0, 1] == np.inf and average[1, 2] == -np.inf


@pytest.mark.parametrize("shape", SHAPES)
def test_means_as_planes_and_as_rows(jit: Jit, shape: tuple[int, ...]) -> None:
    x = values(shape)
    expected = x.astype(np.float64).mean((2, 3))
    rows = run(jit, x, st.Rows(shape[0], shape[1]), st.Reduce(**NAMES))
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)
    planes = run(jit, x, Planes(shape[1], shape[0], 1, 1), st.Reduce(**NAMES))
    assert np.array_equal(planes[:, :, 0, 0], rows)
    x[0, 0, -1, -1], x[-1, -1, 0, 0] = np.nan, -np.inf
    largest = run(jit, x, st.Rows(shape[0], shape[1]), st.Reduce(**NAMES, kind="max"))
    assert np.array_equal(largest, x.max((2, 3)), equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_flattening_and_joining(jit: Jit, shape: tuple[int, ...]) -> None:
    x = values(shape)
    features = int(np.prod(shape[1:]))
    rows = run(jit, x, st.Rows(shape[0], features), st.Flatten(**NAMES))
    assert np.array_equal(rows, x.reshape(shape[0], -1))
    step = st.Concat(**NAMES, sources=("x", "x", "x"))
    joined = run(jit, x, same((shape[0], 3 * shape[1], *shape[2:])), step)
    assert np.array_equal(joined, np.concatenate([x, x, x], 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_planes_times_a_number_each(jit: Jit, shape: tuple[int, ...]) -> None:
    x = values(shape)
    steps = (
        st.Reduce(source="x", target="m", node="n"),
        st.Spread(**NAMES, other="m"),
    )
    images, channels = shape[:2]
    tensors = {
        "x": same(shape), "y": same(shape), "m": Planes(channels, images, 1, 1)
    }  # fmt: skip
    program = Program(steps, tensors, "x", ["y"], Costs(), 1, space=Space("before"))
    program.feed(x)
    for one in program.operations:
        USED.add(one.kernel)
        Kernel(jit.address(one.kernel, one.build))(one.record.address, 0, 1)
    expected = x * x.mean((2, 3), keepdims=True)
    np.testing.assert_allclose(program.result("y"), expected, rtol=1e-5, atol=1e-6)


def point(jit: Jit, x: Floats, kind: str, **more: object) -> Floats:
    return run(jit, x, same(x.shape), st.Point(**NAMES, kind=kind, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
def test_value_by_value(jit: Jit, shape: tuple[int, ...]) -> None:
    x = values(shape) * 3
    assert np.array_equal(point(jit, x, "clip", low=-0.5, high=1.0), np.clip(x, -0.5, 1))
    assert np.array_equal(point(jit, x, "add", other="x", low=0.0), np.maximum(x + x, 0))
    assert np.array_equal(point(jit, x, "mul", other="x"), x * x)
    numbers = values((shape[1], 2), 1)
    expected = x.astype(np.float64) * numbers[:, 0, None, None] + numbers[:, 1, None, None]
    got = point(jit, x, "affine", numbers=numbers, high=2.0)
    np.testing.assert_allclose(got, np.minimum(expected, 2), rtol=1e-5, atol=1e-6)
    leaky = np.where(x < 0, x * np.float32(0.1), x)
    assert np.array_equal(point(jit, x, "leaky", low=0.1), leaky)
    sigmoid = 1 / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(point(jit, x, "sigmoid"), sigmoid, rtol=1e-6)
    np.testing.assert_allclose(point(jit, x, "silu"), x * sigmoid, rtol=1e-6)
    hard = np.clip(x / 6 + 0.5, 0, 1)
    got = point(jit, x, "hard_sigmoid", low=1 / 6, high=0.5)
    np.testing.assert_allclose(got, hard, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(point(jit, x, "hard_swish"), x * hard, rtol=1e-5, atol=2e-6)


def test_what_is_not_a_number_stays_so(jit: Jit) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0.0], np.float32).reshape(1, 1, 2, 2)
    nan, inf, low, zero = 0, 1, 2, 3
    one = point(jit, x, "clip", low=0.0, high=6.0).reshape(-1)
    assert np.isnan(one[nan]) and list(one[[inf, low, zero]]) == [6, 0, 0]
    relu = point(jit, x, "clip", low=0.0).reshape(-1)
    assert np.isnan(relu[nan]) and list(relu[[inf, low]]) == [np.inf, 0]
    for kind, more in (
        ("sigmoid", {}), ("silu", {}), ("hard_swish", {}), ("leaky", {"low": 0.1}),
        ("hard_sigmoid", {"low": 0.2, "high": 0.5}), ("mul", {"other": "x"}),
    ):  # fmt: skip
        assert np.isnan(point(jit, x, kind, **more).reshape(-1)[nan]), kind  # type: ignore[arg-type]
    sigmoid = point(jit, x, "sigmoid").reshape(-1)
    assert abs(sigmoid[inf] - 1) < 1e-7 and abs(sigmoid[low]) < 1e-7 and sigmoid[zero] == 0.5
    assert point(jit, x, "silu").reshape(-1)[inf] == np.inf
    hard = point(jit, x, "hard_sigmoid", low=0.2, high=0.5).reshape(-1)
    assert list(hard[[inf, low]]) == [1, 0]


def test_the_exponential_is_right_to_a_few_ulp(jit: Jit) -> None:
    x = np.linspace(-80, 80, 32_000, dtype=np.float32).reshape(1, 1, 160, 200)
    got = point(jit, x, "sigmoid").astype(np.float64)
    expected = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert (np.abs(got - expected) / expected).max() < 4e-7


@pytest.mark.parametrize("inputs, outputs", [(5, 3), (16, 16), (33, 17), (4, 40)])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_linear_layers(jit: Jit, inputs: int, outputs: int, density: float) -> None:
    x, weight = values((3, inputs, 1, 1)), values((inputs, outputs), 1)
    weight *= np.random.default_rng(2).random(weight.shape) < density
    bias = values((outputs,), 3)
    tensors = {"x": Planes(inputs, 3, 1, 1), "f": st.Rows(3, inputs), "y": st.Rows(3, outputs)}
    steps = (
        st.Flatten(source="x", target="f", node="n"),
        st.Linear(source="f", target="y", node="n", weight=weight, bias=bias, low=-1.0),
    )
    for guard in ("after", "before"):
        program = Program(steps, tensors, "x", ["y"], Costs(), 2, space=Space(guard))
        program.feed(x)
        for one in program.operations:
            USED.add(one.kernel)
            for thread in (0, 1):
                Kernel(jit.address(one.kernel, one.build))(one.record.address, thread, 2)
        expected = np.maximum(x[:, :, 0, 0].astype(np.float64) @ weight + bias, -1)
        np.testing.assert_allclose(program.result("y"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fill", [0.0, -np.inf])
@pytest.mark.parametrize("strides", [(1, 1), (2, 3), (1, 2), (3, 1)])
@pytest.mark.parametrize("size", [(7, 9), (1, 1), (4, 40), (5, 16)])
def test_frames(jit: Jit, strides: tuple[int, int], size: tuple[int, int], fill: float) -> None:
    x = values((2, 3, *size))
    window = Window((3, 3), strides, pads=(1, 1, 1, 1))
    source = same(x.shape)
    geometry = Geometry(source, window, Planes(1, 2, *window.output(*size)))
    frame = Frame.around(geometry)
    step = st.Framed(**NAMES, frame=frame, fill=fill)
    for guard in ("after", "before"):
        got = run(jit, x, frame.planes, step, guard=guard)[0, :, 0]
        place = np.arange(geometry.target.height)[:, None] * frame.pitch
        place = place + np.arange(geometry.target.width)
        padded = window_values(x, window, fill, geometry.target)
        for tap, shift in enumerate(frame.shifts(geometry)):
            mine = got[geometry.taps.phase[tap] :: len(frame.phases)]
            for image in range(2):
                found = mine[:, place + shift + image * frame.rows * frame.pitch]
                assert np.array_equal(found, padded[tap, image])


@pytest.mark.parametrize("size", [(7, 7), (5, 20), (4, 16), (2, 1)])
@pytest.mark.parametrize("guard", ["after", "before"])
def test_out_of_frames(jit: Jit, size: tuple[int, int], guard: str) -> None:
    source, out = Planes(1, 2, *size), Planes(3, 2, *size)
    frame = Frame.around(Geometry(source, Window((3, 3), pads=(1, 1, 1, 1)), out))
    over = frame.written(out)
    x = values((1, 3, 1, over.pixels))
    once = st.Unframed(**NAMES, frame=frame, low=-0.5, high=1.0)
    clipped = st.Unframed(source="x", target="r", node="n", frame=frame, low=0.0)
    twice = st.Unframed(**NAMES, frame=frame, residual="r", high=2.0)
    grid = np.full((3, 2 * frame.rows * frame.pitch), np.nan, np.float32)
    grid[:, : over.pixels] = x[0, :, 0]
    grid = grid.reshape(3, 2, frame.rows, frame.pitch)[:, :, : size[0], : size[1]]
    grid = grid.transpose(1, 0, 2, 3)
    expected = {(once,): np.clip(grid, -0.5, 1)}
    expected[clipped, twice] = np.minimum(np.maximum(grid, 0) + grid, 2)
    for steps, wanted in expected.items():
        tensors: dict[str, st.Tensor] = {"x": over, "r": out, "y": out}
        program = Program(steps, tensors, "x", ["y"], Costs(), 1, space=Space(guard))  # type: ignore[arg-type]
        program.feed(x)
        for one in program.operations:
            USED.add(one.kernel)
            Kernel(jit.address(one.kernel, one.build))(one.record.address, 0, 1)
        assert np.array_equal(program.result("y"), wanted)


def test_every_kernel_was_run() -> None:
    if len(USED) > 3:  # not when this test runs alone
        assert set(PLANE_KERNELS) == USED
