"""Kernels that change planes or rows value by value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llvmlite import ir

from moon.runtime.sparse.frames import Layout
from moon.runtime.sparse.ir import F32, VEC, Fn
from moon.runtime.sparse.ir_math import exponential
from moon.runtime.sparse.kernel import Kernel

__all__ = ["POINTWISE", "POINTWISE_KINDS", "build_pointwise"]

# Planes in, planes out; ``other``: planes, or a number (or two) a channel.
POINTWISE = Layout("source", "other", "target", "channels", "vectors", "pitch", "low", "high")


Way = Callable[[Kernel, Any, Any, Any], Any]


def _sigmoid(k: Fn, x: Any) -> Any:
    grown = exponential(k, k.b.fneg(x))
    return k.b.fdiv(k.every(1.0), k.b.fadd(k.every(1.0), grown))


def _hard_sigmoid(k: Fn, x: Any, slope: float) -> Any:
    line = k.fma(x, k.every(slope), k.every(0.5))
    return k.clamp(line, k.zero(), k.every(1.0))


# x: a vector; y: of the other planes, or a number of the channel; z: the channel's second number.
_WAYS: Mapping[str, Way] = {
    "clip": lambda one, x, y, z: one.k.clamp(x, one.f["low"], one.f["high"]),
    "add": lambda one, x, y, z: one.k.clamp(one.k.b.fadd(x, y), one.f["low"], one.f["high"]),
    "mul": lambda one, x, y, z: one.k.b.fmul(x, y),
    "affine": lambda one, x, y, z: one.k.clamp(one.k.fma(x, y, z), one.f["low"], one.f["high"]),
    "leaky": lambda one, x, y, z: one.k.where(
        one.k.b.fcmp_ordered("<", x, one.k.zero()), one.k.b.fmul(x, one.f["low"]), x
    ),
    "sigmoid": lambda one, x, y, z: _sigmoid(one.k, x),
    "silu": lambda one, x, y, z: one.k.b.fmul(x, _sigmoid(one.k, x)),
    "hard_sigmoid": lambda one, x, y, z: one.k.clamp(
        one.k.fma(x, one.f["low"], one.f["high"]), one.k.zero(), one.k.every(1.0)
    ),
    "hard_swish": lambda one, x, y, z: one.k.b.fmul(x, _hard_sigmoid(one.k, x, 1 / 6)),
}
_BY_PLANE, _BY_CHANNEL = frozenset({"add", "mul"}), frozenset({"affine"})


def build_pointwise(module: ir.Module, name: str) -> None:
    """``point_NAME`` of the table above."""
    one = Kernel(module, name, POINTWISE)
    k, f = one.k, one.f
    kind = name.removeprefix("point_")
    begin, end = one.mine(f["channels"])
    with k.loop(begin, end) as channel:
        offset = k.mul(channel, f["pitch"])
        source, target = k.at(f["source"], offset), k.at(f["target"], offset)
        y = z = None
        if kind in _BY_CHANNEL:
            numbers = k.at(f["other"], k.shifted(channel, 3))
            y, z = k.splat(k.load(F32, numbers)), k.splat(k.load(F32, numbers, 4))
        with k.loop(0, f["vectors"]) as v:
            at = k.shifted(v, 6)
            if kind in _BY_PLANE:
                y = k.load(VEC, k.at(f["other"], offset), at, 64)
            value = _WAYS[kind](one, k.load(VEC, source, at, 64), y, z)
            k.store(value, target, at, 64)
    k.done()


POINTWISE_KINDS = tuple(_WAYS)
