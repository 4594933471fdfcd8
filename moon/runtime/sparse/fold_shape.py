"""Operators that move or count constants, as ONNX defines them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moon.runtime.sparse.fold_call import Array, Call, Evaluate, LeaveError, whole

__all__ = ["SHAPE"]


def _constant_of_shape(call: Call) -> Array:
    (dims,) = call.arrays(1)
    value = call.attributes.get("value", np.zeros(1, np.float32))
    if not isinstance(value, np.ndarray) or value.size != 1 or dims.ndim != 1:
        raise LeaveError
    shape = whole(dims)
    call.room(shape, value.dtype)
    # Zeros need no memory until they are written.
    if not any(value.tobytes()):
        return np.zeros(shape, value.dtype)
    return np.full(shape, value.reshape(()), value.dtype)


def _scatter(call: Call) -> Array:
    data, indices, updates = call.arrays(3)
    axis = _axis(call.integer("axis", 0), data.ndim)
    if indices.dtype.kind != "i" or indices.shape != updates.shape or updates.ndim != data.ndim:
        raise LeaveError
    if data.dtype != updates.dtype or call.attributes.get("reduction", "none") != "none":
        raise LeaveError
    out = np.array(data)
    if data.ndim == 1:
        out[indices] = updates
        return out
    grid: list[Any] = list(np.ogrid[tuple(slice(size) for size in indices.shape)])
    grid[axis] = indices
    out[tuple(grid)] = updates
    return out


def _gather(call: Call) -> Array:
    data, indices = call.arrays(2)
    axis = _axis(call.integer("axis", 0), data.ndim)
    if indices.dtype.kind != "i":
        raise LeaveError
    call.room((*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]), data.dtype)
    return np.asarray(np.take(data, indices, axis=axis))


def _gather_elements(call: Call) -> Array:
    data, indices = call.arrays(2)
    axis = _axis(call.integer("axis", 0), data.ndim)
    if indices.dtype.kind != "i" or indices.ndim != data.ndim:
        raise LeaveError
    grid: list[Any] = list(np.ogrid[tuple(slice(size) for size in indices.shape)])
    grid[axis] = indices
    return np.asarray(data[tuple(grid)])


def _reshape(call: Call) -> Array:
    data, wanted = call.arrays(2)
    shape = list(whole(wanted))
    if wanted.ndim != 1:
        raise LeaveError
    if not call.integer("allowzero", 0):
        shape = [data.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return data.reshape(shape)


def _slice(call: Call) -> Array:
    if call.opset < 10:
        (data,) = call.arrays(1)
        starts, ends = call.integers("starts"), call.integers("ends")
        axes, steps = call.integers("axes"), None
    else:
        if not 3 <= len(call.inputs) <= 5 or call.attributes or call.inputs[0] is None:
            raise LeaveError
        data = call.inputs[0]
        given = [None if values is None else whole(values) for values in call.inputs[1:]]
        starts, ends, axes, steps = (*given, None, None)[:4]
    if starts is None or ends is None:
        raise LeaveError
    axes = tuple(range(len(starts))) if axes is None else axes
    steps = (1,) * len(starts) if steps is None else steps
    axes = tuple(_axis(axis, data.ndim) for axis in axes)
    if not len(starts) == len(ends) == len(axes) == len(steps) == len(set(axes)) or 0 in steps:
        raise LeaveError
    cuts = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        cuts[axis] = _cut(data.shape[axis], start, end, step)
    return np.asarray(data[tuple(cuts)])


def _cut(size: int, start: int, end: int, step: int) -> slice:
    start = start + size if start < 0 else start
    end = end + size if end < 0 else end
    if step > 0:
        return slice(min(max(start, 0), size), min(max(end, 0), size), step)
    start, end = min(max(start, 0), size - 1), min(max(end, -1), size - 1)
    return slice(start, None if end < 0 else end, step) if size else slice(0, 0)


def _concat(call: Call) -> Array:
    arrays = call.alike(1, 1 << 30)
    axis = _axis(call.integer("axis", 1 << 30), arrays[0].ndim)
    total = sum(array.shape[axis] for array in arrays if array.ndim == arrays[0].ndim)
    call.room((*arrays[0].shape[:axis], total, *arrays[0].shape[axis + 1 :]), arrays[0].dtype)
    return np.concatenate(arrays, axis)


def _unsqueeze(call: Call) -> Array:
    axes = call.axes(13)
    data = call.inputs[0]
    if data is None or axes is None:
        raise LeaveError
    return np.expand_dims(data, axes)


def _squeeze(call: Call) -> Array:
    axes = call.axes(13)
    data = call.inputs[0]
    if data is None:
        raise LeaveError
    return np.asarray(np.squeeze(data, axes))


def _transpose(call: Call) -> Array:
    (data,) = call.arrays(1)
    return np.transpose(data, call.integers("perm"))


def _flatten(call: Call) -> Array:
    (data,) = call.arrays(1)
    axis = call.integer("axis", 1)
    if not -data.ndim <= axis <= data.ndim:
        raise LeaveError
    axis = axis + data.ndim if axis < 0 else axis
    return data.reshape(math.prod(data.shape[:axis]), math.prod(data.shape[axis:]))


def _identity(call: Call) -> Array:
    return call.arrays(1)[0]


def _shape(call: Call) -> Array:
    (data,) = call.arrays(1)
    start, end = call.integer("start", 0), call.integer("end", data.ndim)
    cut = _cut(data.ndim, start, end, 1)
    return np.array(data.shape[cut], np.int64)


def _size(call: Call) -> Array:
    return np.array(call.arrays(1)[0].size, np.int64)


def _range(call: Call) -> Array:
    start, limit, delta = call.alike(3)
    # Sums of floats depend on how the runtime adds them up.
    if start.dtype.kind != "i" or start.size * limit.size * delta.size != 1 or not delta:
        raise LeaveError
    span = range(*(int(value.reshape(())) for value in (start, limit, delta)))
    if not span:
        return np.zeros(0, start.dtype)
    call.room(((span[-1] - span[0]) // span.step + 1,), np.dtype(np.int64))
    return np.arange(span.start, span.stop, span.step, dtype=np.int64).astype(start.dtype)


def _expand(call: Call) -> Array:
    data, wanted = call.arrays(2)
    shape = np.broadcast_shapes(data.shape, whole(wanted))
    call.room(shape, data.dtype)
    return np.broadcast_to(data, shape)


def _tile(call: Call) -> Array:
    data, repeats = call.arrays(2)
    times = whole(repeats)
    if len(times) != data.ndim:
        raise LeaveError
    call.room((size * count for size, count in zip(data.shape, times, strict=True)), data.dtype)
    return np.tile(data, times)


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise LeaveError
    return axis + rank if axis < 0 else axis


SHAPE: dict[str, tuple[Evaluate, frozenset[str]]] = {
    "Concat": (_concat, frozenset({"axis"})),
    "ConstantOfShape": (_constant_of_shape, frozenset({"value"})),
    "Expand": (_expand, frozenset()),
    "Flatten": (_flatten, frozenset({"axis"})),
    "Gather": (_gather, frozenset({"axis"})),
    "GatherElements": (_gather_elements, frozenset({"axis"})),
    "Identity": (_identity, frozenset()),
    "Range": (_range, frozenset()),
    "Reshape": (_reshape, frozenset({"allowzero"})),
    "ScatterElements": (_scatter, frozenset({"axis", "reduction"})),
    "Shape": (_shape, frozenset({"start", "end"})),
    "Size": (_size, frozenset()),
    "Slice": (_slice, frozenset({"starts", "ends", "axes"})),
    "Squeeze": (_squeeze, frozenset({"axes"})),
    "Tile": (_tile, frozenset()),
    "Transpose": (_transpose, frozenset({"perm"})),
    "Unsqueeze": (_unsqueeze, frozenset({"axes"})),
}
