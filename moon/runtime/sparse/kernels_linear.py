"""Kernels of linear layers on rows of features."""

from __future__ import annotations

from llvmlite import ir

from moon.runtime.sparse.frames import Layout
from moon.runtime.sparse.ir import F32, I32, I64, INTS, VEC
from moon.runtime.sparse.ir_math import total
from moon.runtime.sparse.kernel import Kernel

__all__ = ["LINEAR", "SPARSE_LINEAR", "build_linear", "build_sparse_linear"]

# source [images, inputs]; weights [groups, inputs, 16], bias [groups, 16], target [images, step].
LINEAR = Layout(
    "source", "target", "images", "inputs", "groups", "source_step", "target_step", "weights",
    "bias", "low", "high",
)  # fmt: skip
# Rows of nonzeros, padded to sixteen: starts [outputs + 1] in groups; index and weights by group.
SPARSE_LINEAR = Layout(
    "source", "target", "images", "outputs", "source_step", "target_step", "starts", "index",
    "weights", "bias", "low", "high",
)  # fmt: skip


def build_linear(module: ir.Module, name: str) -> None:
    """Sixteen outputs at a time, a vector of them for each input."""
    one = Kernel(module, name, LINEAR)
    k, f = one.k, one.f
    begin, end = one.mine(k.mul(f["images"], f["groups"]))
    with k.loop(begin, end) as item:
        group, image = k.div(item, f["images"]), k.mod(item, f["images"])
        source = k.at(f["source"], k.mul(image, f["source_step"]))
        weights = k.at(f["weights"], k.shifted(k.mul(group, f["inputs"]), 6))
        sums = [k.variable(VEC, k.zero()) for _ in range(4)]
        sums[0].set(k.load(VEC, f["bias"], k.shifted(group, 6)))
        fours = k.div(f["inputs"], 4)
        with k.loop(0, fours) as n:
            for i, one_sum in enumerate(sums):
                at = k.add(k.mul(n, 4), i)
                x = k.splat(k.load(F32, source, k.shifted(at, 2)))
                w = k.load(VEC, weights, k.shifted(at, 6))
                one_sum.set(k.fma(x, w, one_sum.get()))
        with k.loop(k.mul(fours, 4), f["inputs"]) as at:
            x = k.splat(k.load(F32, source, k.shifted(at, 2)))
            sums[0].set(k.fma(x, k.load(VEC, weights, k.shifted(at, 6)), sums[0].get()))
        pairs = [k.b.fadd(sums[i].get(), sums[i + 2].get()) for i in (0, 1)]
        value = k.clamp(k.b.fadd(*pairs), f["low"], f["high"])
        target = k.at(f["target"], k.mul(image, f["target_step"]))
        k.store(value, target, k.shifted(group, 6))
    k.done()


def build_sparse_linear(module: ir.Module, name: str) -> None:
    """An output at a time, sixteen of its nonzeros together."""
    one = Kernel(module, name, SPARSE_LINEAR)
    k, f = one.k, one.f
    begin, end = one.mine(k.mul(f["images"], f["outputs"]))
    with k.loop(begin, end) as item:
        output, image = k.div(item, f["images"]), k.mod(item, f["images"])
        source = k.at(f["source"], k.mul(image, f["source_step"]))
        first = k.load(I64, f["starts"], k.shifted(output, 3), 8)
        last = k.load(I64, f["starts"], k.shifted(k.add(output, 1), 3), 8)
        sums = k.variable(VEC, k.zero())
        with k.loop(first, last) as group:
            at = k.shifted(group, 6)
            x = k.gather(source, k.load(INTS, f["index"], at))
            sums.set(k.fma(x, k.load(VEC, f["weights"], at), sums.get()))
        bias = k.load(F32, f["bias"], k.shifted(output, 2))
        value = k.b.fadd(total(k, sums.get()), bias)
        # As a vector, for the same rule of NaN.
        clamped = k.clamp(k.splat(value), f["low"], f["high"])
        target = k.at(f["target"], k.mul(image, f["target_step"]))
        single = k.b.extract_element(clamped, ir.Constant(I32, 0))
        k.store(single, target, k.shifted(output, 2))
    k.done()
