"""Random convolutions: run by the kernels, with NaN around every buffer, and by numpy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.conv_weights import ConvWeights
from moon.runtime.sparse.convolution import CALLS, Convolution, Places
from moon.runtime.sparse.frame import Frame, frame_of
from moon.runtime.sparse.geometry import Geometry, Window
from moon.runtime.sparse.jit import Jit
from moon.runtime.sparse.kernels_conv import build_conv
from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.memory import Reach, Space
from moon.runtime.sparse.plan import Plan, readings, sound

Floats = NDArray[np.float32]
Kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
# Tiles and rows together: few, as each shape of a kernel is compiled.
SHAPES = ((1, 1), (3, 1), (2, 4))
_AROUND = 1 << 16


@dataclass(frozen=True, eq=False)
class Case:
    """A convolution with its input; residual may be None."""

    x: Floats
    weight: Floats
    bias: Floats
    window: Window
    groups: int
    residual: Floats | None
    low: float
    high: float

    @property
    def geometry(self) -> Geometry:
        images, channels, height, width = self.x.shape
        out = self.window.output(height, width)
        source = Planes(channels, images, height, width)
        return Geometry(source, self.window, Planes(len(self.weight), images, *out))

    def expected(self) -> NDArray[np.float64]:
        """[images, rows, height, width], tap by tap in float64."""
        (ky, kx), (sy, sx), (dy, dx) = (
            self.window.kernel,
            self.window.strides,
            self.window.dilations,
        )
        top, left, bottom, right = self.window.pads
        x = np.pad(self.x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
        _, _, height, width = x.shape
        rows, own = self.weight.shape[:2]
        out = self.geometry.target
        y = np.zeros((len(x), rows, out.height, out.width)) + self.bias[:, None, None]
        for group in range(self.groups):
            mine = slice(group * rows // self.groups, (group + 1) * rows // self.groups)
            xs = x[:, group * own : (group + 1) * own]
            for i in range(ky):
                for j in range(kx):
                    part = xs[:, :, i * dy : height : sy, j * dx : width : sx]
                    part = part[:, :, : out.height, : out.width]
                    y[:, mine] += np.einsum("rc,nchw->nrhw", self.weight[mine, :, i, j], part)
        if self.residual is not None:
            y += self.residual
        return np.clip(y, self.low, self.high)


def random_case(seed: int) -> Case | None:
    """None where the window does not fit the image."""
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([1, 1, 1, 2, 4]))
    own, each = int(rng.choice([1, 3, 8, 40])), int(rng.integers(1, 8))
    kernel = (int(rng.choice([1, 1, 3, 3, 5])), int(rng.choice([1, 1, 3, 3, 2])))
    strides = (int(rng.choice([1, 1, 2, 3])), int(rng.choice([1, 1, 2, 3])))
    if rng.random() < 0.5:
        strides = (strides[0], strides[0])
    d = int(rng.choice([1, 1, 2]))
    pads = (d * (kernel[0] // 2), d * (kernel[1] // 2)) * 2
    if rng.random() < 0.4:
        pads = tuple(int(pad) for pad in rng.integers(0, 3, 4))
    height, width = int(rng.choice([1, 4, 7, 8, 16, 11])), int(rng.choice([4, 5, 7, 16, 16, 32]))
    window = Window(kernel, strides, (d, d), (pads[0], pads[1], pads[2], pads[3]))
    images = int(rng.integers(1, 6))
    if min(window.output(height, width)) < 1:
        return None
    weight = rng.normal(size=(each * groups, own, *kernel)).astype(np.float32)
    weight *= rng.random(weight.shape) < rng.choice([0, 0.05, 0.3, 0.7, 1])
    weight[rng.random(len(weight)) < 0.1] = 0  # empty rows and channels
    weight[:, rng.random(own) < 0.1] = 0
    x = rng.normal(size=(images, own * groups, height, width)).astype(np.float32)
    shape = (images, len(weight), *window.output(height, width))
    residual = rng.normal(size=shape).astype(np.float32) if rng.random() < 0.5 else None
    low, high = (0.0, float("inf")) if rng.random() < 0.5 else (-0.5, 0.75)
    bias = rng.normal(size=len(weight)).astype(np.float32)
    return Case(x, weight, bias, window, groups, residual, low, high)


def plans(case: Case, seed: int) -> Iterator[Plan]:
    """A plan of every shape and reading there is, with a random block."""
    rng = np.random.default_rng(seed)
    for reading in readings(case.geometry):
        for tile, together in SHAPES:
            plan = Plan(
                tile=tile, together=together, reading=reading,
                block=int(rng.choice([1, 2, 7, 33, 100_000])),
            )  # fmt: skip
            if sound(case.geometry, plan):
                yield plan


def buffer(space: Space, nbytes: int, reach: Reach | None = None) -> NDArray[np.uint8]:
    """Memory full of NaN, with NaN around it; or beside a page that cannot be touched."""
    reach = reach or Reach()
    if space.guard:
        return space.take(nbytes, reach)
    raw = np.full(nbytes + 2 * _AROUND + sum(reach), 0xFF, np.uint8)
    start = -(raw.ctypes.data + _AROUND + reach.before) % 64 + _AROUND + reach.before
    return raw[start : start + nbytes]


def filled(space: Space, planes: Planes, values: Floats, reach: Reach | None = None) -> Floats:
    """[images, channels, height, width] as planes lie."""
    memory = buffer(space, planes.nbytes, reach).view(np.float32)
    lines = memory.reshape(planes.channels, -1)
    lines[:, : planes.pixels] = values.transpose(1, 0, 2, 3).reshape(planes.channels, -1)
    return memory


def framed(space: Space, case: Case, frame: Frame, reach: Reach) -> Floats:
    """The input as it lies in a frame, pixel by pixel."""
    planes = frame.planes
    memory = buffer(space, planes.nbytes, reach).view(np.float32)
    lines = memory.reshape(planes.channels, -1)
    lines[:, : planes.pixels] = 0
    (sy, sx), images = frame.strides, len(case.x)
    for number, phase in enumerate(frame.phases):
        part = case.x[:, :, phase // sx :: sy, phase % sx :: sx]
        mine = lines[number :: len(frame.phases)]
        for image in range(images):
            for y in range(part.shape[2]):
                start = frame.lead + (image * frame.rows + y) * frame.pitch
                mine[:, start : start + part.shape[3]] = part[image, :, y]
    return memory


def source_of(space: Space, case: Case, plan: Plan, reach: Reach | None = None) -> Floats:
    """The input as the convolution reads it."""
    frame = frame_of(case.geometry, plan.reading)
    if frame is None:
        return filled(space, case.geometry.source, case.x, reach)
    return framed(space, case, frame, reach or Reach())


def convolve(
    jit: Jit, case: Case, plan: Plan, *, parts: int = 1, threads: int = 1, guard: str = ""
) -> Floats:
    """[images, rows, height, width] by the kernels; threads one after the other.

    Where they write over a frame the residual and the clamp, which come behind, are numpy's.
    """
    geometry, space = case.geometry, Space(guard)  # type: ignore[arg-type]
    weights = ConvWeights(case.weight, case.groups)
    convolution = Convolution(
        weights, case.bias, geometry, plan, parts=parts, permute=jit.isa == "avx512", space=space
    )
    out, made = geometry.target, convolution.written
    apart = made != out
    target = buffer(space, made.nbytes).view(np.float32)
    residual = None
    if case.residual is not None and not apart:
        residual = filled(space, out, case.residual)
    step = convolution.scratch_bytes
    places = Places(
        source=source_of(space, case, plan, convolution.reach),
        target=target,
        residual=residual,
        scratch=buffer(space, step * threads * CALLS),
        scratch_step=step,
    )
    bounds = (-np.inf, np.inf) if apart else (case.low, case.high)
    for call in convolution.calls(places, *bounds):
        kernel = call.kernel
        function = Kernel(jit.address(kernel.name, lambda m, kernel=kernel: build_conv(m, kernel)))
        for thread in range(threads):
            function(call.record.address, thread, threads)
    lines = target.reshape(out.channels, -1)
    if not apart:
        found = lines[:, : out.pixels].reshape(out.channels, out.images, out.height, out.width)
        return found.transpose(1, 0, 2, 3)
    frame = Frame.around(geometry)
    every = np.full((out.channels, out.images * frame.rows * frame.pitch), np.nan, np.float32)
    every[:, : made.pixels] = lines[:, : made.pixels]
    grid = every.reshape(out.channels, out.images, frame.rows, frame.pitch)
    found = grid[:, :, : out.height, : out.width].transpose(1, 0, 2, 3)
    with_residual: Floats = found + (0 if case.residual is None else case.residual)
    return np.clip(with_residual, case.low, case.high)


def error(case: Case, got: Floats, expected: NDArray[np.float64]) -> float:
    """The largest difference relative to the values before the clamp; NaN is infinitely wrong."""
    if not np.isfinite(got).all():
        return float("inf")
    size = np.linalg.norm(case.weight.reshape(len(case.weight), -1), axis=1).max()
    return float(np.abs(got - expected).max() / max(1, size))
