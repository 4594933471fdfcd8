"""Nodes as steps, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.model import Node
from moon.runtime.sparse.steps import (
    NO_HIGH,
    NO_LOW,
    Concat,
    Flatten,
    Linear,
    Point,
    Reduce,
    Rows,
    Spread,
    Tensor,
)
from moon.runtime.sparse.windows import conv, pool
from moon.runtime.sparse.work import UnsupportedError, Work, flag, names, number, truth

__all__ = ["OPERATORS"]

Floats = NDArray[np.float32]


def _global(work: Work, node: Node) -> None:
    planes = work.planes(node.inputs[0])
    kind = "max" if node.op_type == "GlobalMaxPool" else "average"
    work.add(Reduce(**names(node), kind=kind), Planes(planes.channels, planes.images, 1, 1))


def _reduce(work: Work, node: Node) -> None:
    planes = work.planes(node.inputs[0])
    if not _of_image(work.whole(node, 1, "axes")):
        raise UnsupportedError("its axes are not those of an image")
    out: Tensor = Rows(planes.images, planes.channels)
    if truth(node, "keepdims", 1):
        out = Planes(planes.channels, planes.images, 1, 1)
    kind = "max" if node.op_type == "ReduceMax" else "average"
    work.add(Reduce(**names(node), kind=kind), out)


def _of_image(axes: tuple[int, ...] | None) -> bool:
    """Whether axes are height and width."""
    return axes is not None and sorted(axis + 4 if axis < 0 else axis for axis in axes) == [2, 3]


def _flatten(work: Work, node: Node) -> None:
    if flag(node, "axis", 1) != 1:
        raise UnsupportedError("its axis is not 1")
    _add_flatten(work, node)


def _squeeze(work: Work, node: Node) -> None:
    planes = work.planes(node.inputs[0])
    if not _of_image(work.whole(node, 1, "axes")) or planes.height * planes.width != 1:
        raise UnsupportedError("it is not a flattening")
    _add_flatten(work, node)


def _reshape(work: Work, node: Node) -> None:
    tensor = work.tensor(node.inputs[0])
    shape, features = work.whole(node, 1, "shape"), _features(tensor)
    same = (tensor.images,) if work.fixed else ()
    flat = [(i, f) for i in (*same, 0, -1) for f in (features, -1) if (i, f) != (-1, -1)]
    if shape not in flat or (0 in shape and truth(node, "allowzero")):
        raise UnsupportedError("it is not a flattening")
    _add_flatten(work, node)


def _add_flatten(work: Work, node: Node) -> None:
    tensor = work.tensor(node.inputs[0])
    work.add(Flatten(**names(node)), Rows(tensor.images, _features(tensor)))


def _features(tensor: Tensor) -> int:
    if isinstance(tensor, Rows):
        return tensor.features
    return tensor.channels * tensor.height * tensor.width


def _gemm(work: Work, node: Node) -> None:
    if truth(node, "transA"):
        raise UnsupportedError("its transA is 1")
    if number(node, "alpha", 1.0) != 1.0 or number(node, "beta", 1.0) != 1.0:
        raise UnsupportedError("its alpha or beta is not 1")
    weight = work.finite(node.inputs[1])
    name = node.inputs[2] if len(node.inputs) > 2 else ""
    bias = work.finite(name) if name else np.zeros(1, np.float32)
    _linear(work, node, weight.T if truth(node, "transB") else weight, bias)


def _mat_mul(work: Work, node: Node) -> None:
    _linear(work, node, work.finite(node.inputs[1]), np.zeros(1, np.float32))


def _linear(work: Work, node: Node, weight: Floats, bias: Floats) -> None:
    rows = work.rows(node.inputs[0])
    if weight.ndim != 2 or weight.shape[0] != rows.features or not weight.size:
        raise UnsupportedError("its weight does not fit its input")
    outputs = weight.shape[1]
    if bias.size not in (1, outputs) or (bias.ndim and bias.shape[-1] != bias.size):
        raise UnsupportedError("its bias does not fit its weight")
    every = np.broadcast_to(bias.reshape(-1), (outputs,)).copy()
    step = Linear(**names(node), weight=weight, bias=every)
    work.add(step, Rows(rows.images, outputs))


def _between(work: Work, node: Node, low: float, high: float) -> None:
    step = Point(**names(node), kind="clip", low=low, high=high)
    work.add(step, work.tensor(node.inputs[0]))


def _relu(work: Work, node: Node) -> None:
    _between(work, node, 0.0, NO_HIGH)


def _same(work: Work, node: Node) -> None:
    """Identity, and Dropout, which is it except while training."""
    training = node.inputs[2] if len(node.inputs) > 2 else ""
    if training and (training not in work.constants or work.constants[training].any()):
        raise UnsupportedError("it is in training mode")
    _between(work, node, NO_LOW, NO_HIGH)


def _clip(work: Work, node: Node) -> None:
    bounds = [number(node, "min", NO_LOW), number(node, "max", NO_HIGH)]
    for i, name in enumerate(node.inputs[1:3]):
        if name:
            values = work.constant(name)
            if values.size != 1:
                raise UnsupportedError("its bounds are no numbers")
            bounds[i] = float(values.reshape(-1)[0])
    if not bounds[0] <= bounds[1]:
        raise UnsupportedError("its bounds are no numbers in order")
    _between(work, node, bounds[0], bounds[1])


def _curve(work: Work, node: Node, kind: str, low: float = NO_LOW, high: float = NO_HIGH) -> None:
    planes = work.planes(node.inputs[0])
    work.add(Point(**names(node), kind=kind, low=low, high=high), planes)


def _leaky(work: Work, node: Node) -> None:
    _curve(work, node, "leaky", number(node, "alpha", 0.01))


def _hard_sigmoid(work: Work, node: Node) -> None:
    _curve(work, node, "hard_sigmoid", number(node, "alpha", 0.2), number(node, "beta", 0.5))


def _batch_norm(work: Work, node: Node) -> None:
    planes = work.planes(node.inputs[0])
    if truth(node, "training_mode"):
        raise UnsupportedError("it is in training mode")
    scale, shift, mean, variance = (work.constant(name) for name in node.inputs[1:5])
    if any(values.shape != (planes.channels,) for values in (scale, shift, mean, variance)):
        raise UnsupportedError("its numbers do not fit its input")
    with np.errstate(all="ignore"):  # what is not finite is refused
        factor = scale / np.sqrt(variance + np.float32(number(node, "epsilon", 1e-5)))
        shift = shift - mean * factor
    _affine(work, node, node.inputs[0], factor, shift)


def _affine(work: Work, node: Node, source: str, factor: Floats, shift: Floats) -> None:
    numbers = np.ascontiguousarray(np.stack([factor, shift], axis=1), np.float32)
    if not np.isfinite(numbers).all():
        raise UnsupportedError("its numbers are not finite")
    step = Point(**names(node, source), kind="affine", numbers=numbers)
    work.add(step, work.planes(source))


def _add_or_mul(work: Work, node: Node) -> None:
    one, other = node.inputs[:2]
    if one in work.constants:
        one, other = other, one
    planes, kind = work.planes(one), node.op_type.lower()
    if other in work.constants:
        values = _by_channel(work.constant(other), planes.channels)
        ones, zeros = np.ones_like(values), np.zeros_like(values)
        _affine(work, node, one, *((ones, values) if kind == "add" else (values, zeros)))
        return
    second = work.planes(other)
    if second == planes:
        work.add(Point(**names(node, one), kind=kind, other=other), planes)
        return
    if planes.height * planes.width == 1:
        one, planes, other, second = other, second, one, planes
    if kind != "mul" or second != Planes(planes.channels, planes.images, 1, 1):
        raise UnsupportedError("its inputs have different shapes")
    work.add(Spread(**names(node, one), other=other), planes)


def _by_channel(values: Floats, channels: int) -> Floats:
    shape = (1,) * (4 - values.ndim) + values.shape
    if values.ndim > 4 or shape[0] != 1 or shape[2:] != (1, 1) or shape[1] not in (1, channels):
        raise UnsupportedError("its constant is not a number a channel")
    return np.broadcast_to(values.reshape(-1), (channels,)).astype(np.float32)


def _concat(work: Work, node: Node) -> None:
    if flag(node, "axis", 0) not in (1, -3):
        raise UnsupportedError("its axis is not that of channels")
    parts = [work.planes(name) for name in node.inputs]
    first = parts[0]
    if any(part.with_channels(first.channels) != first for part in parts):
        raise UnsupportedError("its inputs have different sizes")
    out = first.with_channels(sum(part.channels for part in parts))
    work.add(Concat(**names(node), sources=node.inputs), out)


def _kind(name: str) -> Callable[[Work, Node], None]:
    return lambda work, node: _curve(work, node, name)


# Operator -> how many inputs it must have, and what makes its step.
OPERATORS: Mapping[str, tuple[int, Callable[[Work, Node], Any]]] = {
    "Conv": (2, conv),
    "MaxPool": (1, pool),
    "AveragePool": (1, pool),
    "GlobalAveragePool": (1, _global),
    "GlobalMaxPool": (1, _global),
    "ReduceMean": (1, _reduce),
    "ReduceMax": (1, _reduce),
    "Flatten": (1, _flatten),
    "Reshape": (2, _reshape),
    "Squeeze": (1, _squeeze),
    "Gemm": (2, _gemm),
    "MatMul": (2, _mat_mul),
    "Relu": (1, _relu),
    "Clip": (1, _clip),
    "Sigmoid": (1, _kind("sigmoid")),
    "LeakyRelu": (1, _leaky),
    "HardSigmoid": (1, _hard_sigmoid),
    "HardSwish": (1, _kind("hard_swish")),
    "BatchNormalization": (5, _batch_norm),
    "Add": (2, _add_or_mul),
    "Mul": (2, _add_or_mul),
    "Concat": (1, _concat),
    "Identity": (1, _same),
    "Dropout": (1, _same),
}
