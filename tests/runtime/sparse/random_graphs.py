"""Random small graphs of every operator that the engine knows.

What is random comes from a chooser, so that hypothesis can shrink a graph that fails, and a seed
is enough where many graphs are wanted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from .graphs import Graph

T = TypeVar("T")
# Channels, height, width of a feature map; features of rows are (features,).
Shape = tuple[int, ...]

OPSETS = (8, 9, 11, 13, 17, 20, 21)
# Primes, multiples of a vector's sixteen floats, and what lies beside these.
SIZES = (1, 2, 3, 5, 7, 8, 11, 13, 15, 16, 17, 23, 31, 32, 33, 37, 40)
DENSITIES = (0.0, 0.02, 0.3, 0.5, 1.0)


class Chooser(Protocol):
    def pick(self, options: Sequence[T]) -> T: ...
    def whole(self, low: int, high: int) -> int: ...


class Seeded:
    """By a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def pick(self, options: Sequence[T]) -> T:
        return self._random.choice(options)

    def whole(self, low: int, high: int) -> int:
        return self._random.randint(low, high)


class Drawn:
    """By hypothesis."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def pick(self, options: Sequence[T]) -> T:
        found: T = self._data.draw(st.sampled_from(options))
        return found

    def whole(self, low: int, high: int) -> int:
        return int(self._data.draw(st.integers(low, high)))


class RandomGraph(Graph):
    """A graph that knows the shapes of its tensors."""

    def __init__(self, chooser: Chooser, shape: Shape, opset: int) -> None:
        super().__init__(*shape, opset=opset)
        self.chooser, self.opset = chooser, opset
        self.shapes: dict[str, Shape] = {"x": shape}
        self._random = np.random.default_rng(chooser.whole(0, 1 << 16))

    def put(self, shape: Shape, op: str, *inputs: str, **attributes: Any) -> str:
        name = self.add(op, *inputs, **attributes)
        self.shapes[name] = shape
        return name

    def sparse(self, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
        """Weights of a random density, some rows and channels empty, some values odd."""
        values = self._random.normal(size=shape) * scale
        values *= self._random.random(shape) < self.chooser.pick(DENSITIES)
        odd = self.chooser.pick(("", "", "rows", "channels", "signs", "denormal"))
        if odd == "rows":
            values[self._random.random(shape[0]) < 0.5] = 0
        elif odd == "channels":
            values[:, self._random.random(shape[1]) < 0.5] = 0
        elif odd == "signs":
            values[values == 0] = -0.0
        elif odd == "denormal":
            values[self._random.random(shape) < 0.3] = 1e-41
        return values.astype(np.float32)

    def numbers(self, count: int, low: float = -1.0, high: float = 1.0) -> str:
        return self.constant(self._random.uniform(low, high, count))


def _out(size: int, pads: int, extent: int, stride: int, ceil: int = 0) -> int:
    room = size + pads - extent
    return (-(-room // stride) if ceil else room // stride) + 1


def _conv(g: RandomGraph, source: str) -> str | None:
    c, (channels, height, width) = g.chooser, g.shapes[source]
    kernel = c.pick(
        ((1, 1), (3, 3), (3, 3), (1, 1), (2, 2), (1, 5), (4, 1), (5, 3), (7, 7), (13, 9))
    )
    strides = c.pick(((1, 1), (1, 1), (2, 2), (1, 2), (3, 1), (4, 4), (7, 5)))
    dilations = c.pick(((1, 1), (1, 1), (1, 1), (2, 2), (1, 3), (5, 1)))
    auto = c.pick(("", "", "", "", "SAME_UPPER", "SAME_LOWER", "VALID"))
    if auto.startswith("SAME"):  # ONNX Runtime takes no others
        dilations = (1, 1)
    groups = c.pick([n for n in (1, 1, 1, 2, 3, channels) if channels % n == 0])
    rows = groups * c.whole(1, 1 + 8 // groups)
    extent = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    attributes: dict[str, Any] = {"strides": strides, "dilations": dilations, "group": groups}
    how = c.pick(("same", "same", "none", "any", "far"))
    pads = [extent[0] // 2, extent[1] // 2] * 2
    if how == "any":
        pads = [c.whole(0, extent[i % 2] + 2) for i in range(4)]
    elif how == "far":
        pads = [height + c.whole(0, 3), c.whole(0, 2), c.whole(0, 9), width + 1]
    elif how == "none":
        pads = [0] * 4
    out = [
        _out(size, pads[i] + pads[i + 2], extent[i], strides[i])
        for i, size in enumerate((height, width))
    ]
    if auto.startswith("SAME"):
        out = [-(-size // stride) for size, stride in zip((height, width), strides, strict=True)]
    elif auto:
        out = [_out(s, 0, extent[i], strides[i]) for i, s in enumerate((height, width))]
    attributes |= {"auto_pad": auto} if auto else {"pads": pads}
    if min(out) < 1 or rows * out[0] * out[1] > 1 << 16:
        return None
    own = channels // groups
    weight = g.sparse(rows, own, *kernel, scale=1 / np.sqrt(own * kernel[0] * kernel[1]))
    bias = [g.numbers(rows)] if c.pick((True, True, False)) else []
    return g.put((rows, *out), "Conv", source, g.constant(weight), *bias, **attributes)


def _pool(g: RandomGraph, source: str) -> str | None:
    c, (channels, height, width) = g.chooser, g.shapes[source]
    op = c.pick(("MaxPool", "AveragePool"))
    kernel = c.pick(((2, 2), (3, 3), (3, 2), (1, 4), (5, 5), (1, 1)))
    strides = c.pick(((1, 1), (2, 2), (3, 2), (1, 4), (6, 6)))
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides}
    dilations = (1, 1)
    if g.opset >= (11 if op == "MaxPool" else 19):
        attributes["dilations"] = dilations = c.pick(((1, 1), (1, 1), (2, 1), (3, 2)))
    ceil = 0
    if g.opset >= 11:
        attributes["ceil_mode"] = ceil = c.pick((0, 0, 1))
    if op == "AveragePool":
        attributes["count_include_pad"] = c.pick((0, 1))
    extent = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    auto = c.pick(("", "", "", "SAME_UPPER", "SAME_LOWER", "VALID"))
    pads = [c.whole(0, kernel[i % 2] - 1) for i in range(4)]
    both = [0, 0] if auto else [pads[0] + pads[2], pads[1] + pads[3]]
    out = []
    for i, size in enumerate((height, width)):
        if auto.startswith("SAME"):
            out.append(-(-size // strides[i]))
            continue
        steps = _out(size, both[i], extent[i], strides[i], ceil)
        begin = 0 if auto else pads[i]
        out.append(steps - (ceil and (steps - 1) * strides[i] >= size + begin))
    if min(out) < 1 or any(
        e > s + b for e, s, b in zip(extent, (height, width), both, strict=True)
    ):
        return None
    attributes |= {"auto_pad": auto} if auto else {"pads": pads}
    return g.put((channels, *out), op, source, **attributes)


def _mean(g: RandomGraph, source: str) -> str:
    channels = g.shapes[source][0]
    way = g.chooser.pick(("global", "keep", "rows"))
    over, reduce = g.chooser.pick(
        (("GlobalAveragePool", "ReduceMean"), ("GlobalMaxPool", "ReduceMax"))
    )
    if way == "global":
        return g.put((channels, 1, 1), over, source)
    axes = g.chooser.pick(([2, 3], [-1, -2], [3, -2]))
    keep = int(way == "keep")
    shape = (channels, 1, 1) if keep else (channels,)
    if g.opset < 11:
        axes = [2, 3]
    if g.opset < 18:
        return g.put(shape, reduce, source, axes=axes, keepdims=keep)
    return g.put(shape, reduce, source, g.constant(axes, np.int64), keepdims=keep)


def _flat(g: RandomGraph, source: str) -> str | None:
    shape = g.shapes[source]
    features = int(np.prod(shape))
    way = g.chooser.pick(("Flatten", "Reshape", "Squeeze"))
    if way == "Squeeze" and shape[1:] == (1, 1):
        if g.opset < 13:
            return g.put((features,), "Squeeze", source, axes=[2, 3])
        return g.put((features,), "Squeeze", source, g.constant([2, 3], np.int64))
    if way == "Reshape":
        wanted = g.chooser.pick(([0, -1], [-1, features], [0, features]))
        return g.put((features,), "Reshape", source, g.constant(wanted, np.int64))
    return g.put((features,), "Flatten", source)


def _linear(g: RandomGraph, source: str) -> str | None:
    (features,) = g.shapes[source]
    outputs = g.chooser.pick((1, 3, 10, 16, 17, 40))
    weight = g.sparse(features, outputs, scale=1 / np.sqrt(features))
    if g.chooser.pick((True, False)):
        return g.put((outputs,), "MatMul", source, g.constant(weight))
    turned = g.chooser.pick((0, 1))
    bias = g.chooser.pick(("", "row", "line", "one") if g.opset >= 11 else ("row", "one"))
    shapes = {"row": (outputs,), "line": (1, outputs), "one": (1,)}
    more = [g.constant(g._random.normal(size=shapes[bias]))] if bias else []
    name = g.constant(weight.T if turned else weight)
    return g.put((outputs,), "Gemm", source, name, *more, transB=turned)


def _point(g: RandomGraph, source: str) -> str | None:
    c, shape = g.chooser, g.shapes[source]
    op = c.pick(
        ("Relu", "Clip", "Identity", "Dropout", "Sigmoid", "LeakyRelu", "HardSigmoid", "HardSwish")
    )
    if op == "Clip":
        low, high = c.pick(((-0.5, 0.5), (0.0, 6.0), (None, 0.25), (0.1, None), (0.3, 0.3)))
        if g.opset < 11:
            bounds = {"min": low, "max": high}
            return g.put(shape, op, source, **{k: v for k, v in bounds.items() if v is not None})
        names = ["" if v is None else g.constant(v) for v in (low, high)]
        return g.put(shape, op, source, *(names if names[1] else names[:1]))
    if op == "LeakyRelu":
        return g.put(shape, op, source, alpha=c.pick((0.0, 0.1, 2.0)))
    if op == "HardSigmoid":
        return g.put(shape, op, source, alpha=c.pick((0.2, 1 / 6)), beta=c.pick((0.5, 0.1)))
    if op == "HardSwish" and g.opset < 14:
        return None
    return g.put(shape, op, source)


def _norm(g: RandomGraph, source: str) -> str:
    shape = g.shapes[source]
    numbers = [g.numbers(shape[0]) for _ in range(3)]
    variance = g.numbers(shape[0], 0.5, 2.0)
    epsilon = g.chooser.pick((1e-5, 1e-2))
    return g.put(shape, "BatchNormalization", source, *numbers, variance, epsilon=epsilon)


def _two(g: RandomGraph, source: str) -> str:
    shape, c = g.shapes[source], g.chooser
    op = c.pick(("Add", "Mul"))
    alike = [name for name, other in g.shapes.items() if other == shape]
    numbers = (
        [n for n, other in g.shapes.items() if other == (shape[0], 1, 1)] if op == "Mul" else []
    )
    way = c.pick(("same", "same", "constant", "spread"))
    if way == "constant":
        count = c.pick((1, shape[0]))
        values = g._random.normal(size=(count, 1, 1))
        other = g.constant(values)
    else:
        other = c.pick(numbers if way == "spread" and numbers else alike)
    ends = c.pick(((source, other), (other, source)))
    return g.put(shape, op, *ends)


def _concat(g: RandomGraph, source: str) -> str | None:
    size = g.shapes[source][1:]
    fitting = [n for n, other in g.shapes.items() if len(other) == 3 and other[1:] == size]
    others = [g.chooser.pick(fitting) for _ in range(g.chooser.whole(0, 3))]
    names = [source, *others]
    channels = sum(g.shapes[name][0] for name in names)
    if channels * int(np.prod(size)) > 1 << 16:
        return None
    axis = g.chooser.pick((1, -3)) if g.opset >= 11 else 1
    return g.put((channels, *size), "Concat", *names, axis=axis)


def _left(g: RandomGraph, source: str) -> str:
    """What the engine does not know, so that ONNX Runtime has to go on."""
    return g.put(g.shapes[source], "Tanh", source)


ON_PLANES: Mapping[str, Callable[[RandomGraph, str], str | None]] = {
    "conv": _conv, "pool": _pool, "mean": _mean, "flat": _flat, "point": _point, "norm": _norm,
    "two": _two, "concat": _concat,
}  # fmt: skip
ON_ROWS: Mapping[str, Callable[[RandomGraph, str], str | None]] = {
    "linear": _linear, "point": _point, "flat": _flat,
}  # fmt: skip


def start(chooser: Chooser) -> RandomGraph:
    """A graph of nothing but its input."""
    shape = (chooser.pick((1, 2, 3, 4, 6, 17)), chooser.pick(SIZES), chooser.pick(SIZES))
    return RandomGraph(chooser, shape, chooser.pick(OPSETS))


def grow(g: RandomGraph, steps: int, *, left: bool = False) -> list[str]:
    """Add nodes that read what is there; names of what some of the graph's outputs should be."""
    weights = ["conv"] * 6 + ["point"] * 3 + ["norm"] * 2 + ["two"] * 4 + ["concat", "pool", "mean"]
    for _ in range(steps):
        # Mostly the newest, so that graphs grow long, too.
        there = list(g.shapes)
        source = g.chooser.pick([*there, *there[-2:] * 3])
        if len(g.shapes[source]) == 1:
            ON_ROWS[g.chooser.pick(tuple(ON_ROWS))](g, source)
        elif left and g.chooser.whole(0, 15) == 0:
            _left(g, source)
        else:
            ON_PLANES[g.chooser.pick((*weights, "flat"))](g, source)
    made = list(g.shapes)[1:]
    return sorted({g.chooser.pick(made) for _ in range(g.chooser.whole(1, 3))} | {made[-1]})
