"""Arithmetic on constants: each operator as ONNX Runtime's CPU kernels compute it.

Bit for bit but for Exp, Log and Pow, which are correctly rounded here and may differ there in the
last place. Whatever C++ leaves undefined (a division by zero, a float out of an integer's range)
is not folded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from moon.runtime.sparse.fold_call import Array, Call, Evaluate, LeaveError
from moon.runtime.sparse.tensor import DTYPES

__all__ = ["MATH"]

_EXACT_INTEGERS = 1 << 53


def _elementwise(call: Call, function: Callable[..., Any], kinds: str, out: Any = None) -> Array:
    """Two inputs of one type of the ``kinds`` of numpy's type codes, broadcast."""
    left, right = call.alike(2)
    if left.dtype.kind not in kinds:
        raise LeaveError
    call.room(np.broadcast_shapes(left.shape, right.shape), np.dtype(out or left.dtype))
    return np.asarray(function(left, right))


def _unary(call: Call, function: Callable[..., Any], kinds: str) -> Array:
    (values,) = call.arrays(1)
    if values.dtype.kind not in kinds:
        raise LeaveError
    return np.asarray(function(values))


def _divide(call: Call) -> Array:
    left, right = call.alike(2)
    if left.dtype.kind == "f":
        return _elementwise(call, np.divide, "f")
    if (right == 0).any() or (left.dtype.kind == "i" and (right == -1).any()):
        raise LeaveError
    call.room(np.broadcast_shapes(left.shape, right.shape), np.dtype(np.int64))
    # Towards zero, where numpy's goes down.
    quotient, rest = np.divmod(left, right)
    return np.asarray(quotient + ((rest != 0) & ((left < 0) != (right < 0))).astype(left.dtype))


def _reduce(call: Call, function: Callable[..., Any]) -> Array:
    arrays = call.alike(1, 1 << 30)
    if arrays[0].dtype.kind not in "fiu":
        raise LeaveError
    call.room(np.broadcast_shapes(*(array.shape for array in arrays)), arrays[0].dtype)
    result = arrays[0]
    for array in arrays[1:]:
        result = function(result, array)
    return np.asarray(result)


def _power(call: Call) -> Array:
    base, exponent = call.arrays(2)
    if base.dtype.kind not in "fi" or exponent.dtype.kind not in "fi":
        raise LeaveError
    call.room(np.broadcast_shapes(base.shape, exponent.shape), np.dtype(np.float64))
    if base.dtype.kind == "f" and exponent.size == 1 and float(exponent.reshape(())) in (2, 3):
        base = np.broadcast_to(base, np.broadcast_shapes(base.shape, exponent.shape))
        squares = base * base
        return squares if float(exponent.reshape(())) == 2 else squares * base
    result = np.power(base.astype(np.float64), exponent.astype(np.float64))
    if base.dtype.kind == "i" and not (np.abs(result) < _EXACT_INTEGERS).all():
        raise LeaveError
    return np.asarray(result).astype(base.dtype)


def _rounded(call: Call, function: Callable[..., Any]) -> Array:
    (values,) = call.arrays(1)
    if values.dtype.kind != "f":
        raise LeaveError
    call.room(values.shape, np.dtype(np.float64))
    return np.asarray(function(values.astype(np.float64))).astype(values.dtype)


def _reciprocal(call: Call) -> Array:
    (values,) = call.arrays(1)
    if values.dtype.kind != "f":
        raise LeaveError
    return np.asarray(np.divide(np.ones((), values.dtype), values))


def _cast(call: Call) -> Array:
    (values,) = call.arrays(1)
    dtype = DTYPES.get(call.integer("to", 0))
    if dtype is None:
        raise LeaveError
    call.room(values.shape, np.promote_types(dtype, np.float32))
    if values.dtype == dtype:
        return values
    if values.dtype.kind == "f" and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        # Written so that NaN is no either.
        if not ((values > float(limits.min) - 1) & (values < float(limits.max) + 1)).all():
            raise LeaveError
    if dtype == np.bool_:
        return np.asarray(values != 0)
    if dtype == np.float16 and values.dtype != np.float32:
        values = values.astype(np.float32)
    return values.astype(dtype)


def _cumulative(call: Call) -> Array:
    values, axis = call.arrays(2)
    if values.dtype.kind not in "fi" or axis.size != 1 or axis.dtype.kind != "i":
        raise LeaveError
    along = int(axis.reshape(()))
    if not -values.ndim <= along < values.ndim:
        raise LeaveError
    backwards = bool(call.integer("reverse", 0))
    # The type is named because numpy would sum small integers as int64.
    sums: Array
    if not call.integer("exclusive", 0):
        sums = np.cumsum(_turned(values, along, backwards), axis=along, dtype=values.dtype)
        return _turned(sums, along, backwards)
    moved = np.moveaxis(_turned(values, along, backwards), along, 0)
    sums = np.zeros(moved.shape, values.dtype)
    np.cumsum(moved[:-1], axis=0, dtype=values.dtype, out=sums[1:])
    return _turned(np.moveaxis(sums, 0, along), along, backwards)


def _turned(values: Array, axis: int, backwards: bool) -> Array:
    return np.flip(values, axis) if backwards else values


def _choose(call: Call) -> Array:
    where, left, right = call.arrays(3)
    if where.dtype != np.bool_ or left.dtype != right.dtype:
        raise LeaveError
    call.room(np.broadcast_shapes(where.shape, left.shape, right.shape), left.dtype)
    return np.where(where, left, right)


def _compare(function: Callable[..., Any], kinds: str) -> Evaluate:
    return partial(_elementwise, function=function, kinds=kinds, out=np.bool_)


MATH: dict[str, tuple[Evaluate, frozenset[str]]] = {
    **{
        name: (partial(_elementwise, function=function, kinds=kinds), frozenset())
        for name, function, kinds in (
            ("Add", np.add, "fiu"),
            ("Sub", np.subtract, "fiu"),
            ("Mul", np.multiply, "fiu"),
            ("BitwiseAnd", np.bitwise_and, "iu"),
            ("BitwiseOr", np.bitwise_or, "iu"),
            ("BitwiseXor", np.bitwise_xor, "iu"),
            ("And", np.logical_and, "b"),
            ("Or", np.logical_or, "b"),
            ("Xor", np.logical_xor, "b"),
        )
    },
    **{
        name: (_compare(function, kinds), frozenset())
        for name, function, kinds in (
            ("Equal", np.equal, "fiub"),
            ("Greater", np.greater, "fiu"),
            ("GreaterOrEqual", np.greater_equal, "fiu"),
            ("Less", np.less, "fiu"),
            ("LessOrEqual", np.less_equal, "fiu"),
        )
    },
    **{
        name: (partial(_unary, function=function, kinds=kinds), frozenset())
        for name, function, kinds in (
            ("Abs", np.abs, "fiu"),
            ("BitwiseNot", np.invert, "iu"),
            ("Ceil", np.ceil, "f"),
            ("Floor", np.floor, "f"),
            ("IsNaN", np.isnan, "f"),
            ("Neg", np.negative, "fi"),
            ("Not", np.logical_not, "b"),
            ("Sqrt", np.sqrt, "f"),
        )
    },
    "Div": (_divide, frozenset()),
    "Max": (partial(_reduce, function=np.maximum), frozenset()),
    "Min": (partial(_reduce, function=np.minimum), frozenset()),
    "Pow": (_power, frozenset()),
    "Exp": (partial(_rounded, function=np.exp), frozenset()),
    "Log": (partial(_rounded, function=np.log), frozenset()),
    "Reciprocal": (_reciprocal, frozenset()),
    "Cast": (_cast, frozenset({"to", "saturate", "round_mode"})),
    "CumSum": (_cumulative, frozenset({"exclusive", "reverse"})),
    "Where": (_choose, frozenset()),
}
