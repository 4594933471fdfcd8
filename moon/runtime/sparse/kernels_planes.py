"""Kernels that move and pool planes.

Each is ``name``(record, thread, threads) and does its contiguous share of the work.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from moon.runtime.sparse.frames import Layout
from moon.runtime.sparse.ir import F32, INTS, LANES, VEC, Fn
from moon.runtime.sparse.ir_math import total
from moon.runtime.sparse.kernel import Kernel

__all__ = [
    "AVERAGE", "COPY", "POOL", "SPLIT", "SPREAD", "build_average", "build_copy", "build_pool",
    "build_split", "build_spread",
]  # fmt: skip

# Lines of floats: target[i outer][j inner] = source[i][j], steps in bytes, ``count`` floats each.
COPY = Layout(
    "source", "target", "outer", "inner", "count",
    "source_outer", "source_inner", "target_outer", "target_inner",
)  # fmt: skip
# Planes by phase: plane c * phases + p of the target is plane c of the source at index[p].
SPLIT = Layout(
    "source", "target", "channels", "phases", "vectors", "source_pitch", "target_pitch", "index"
)
# index [taps, vectors, 16]; factor [vectors, 16] multiplies an average.
POOL = Layout(
    "source", "target", "channels", "taps", "vectors", "source_pitch", "target_pitch",
    "index", "factor",
)  # fmt: skip
# Means over the pixels of an image: a number for each image and channel, steps in bytes.
AVERAGE = Layout(
    "source", "target", "channels", "images", "pixels", "pitch", "factor",
    "image_step", "channel_step",
)  # fmt: skip
# Planes times a number for each image and channel, which is in planes of one pixel an image.
SPREAD = Layout("source", "other", "target", "channels", "images", "pixels", "pitch", "other_pitch")


def build_copy(module: ir.Module, name: str) -> None:
    """Lines of floats, see COPY."""
    one = Kernel(module, name, COPY)
    k, f = one.k, one.f
    begin, end = one.mine(k.mul(f["outer"], f["inner"]))
    whole = k.div(f["count"], LANES)
    with k.loop(begin, end) as line:
        i, j = k.div(line, f["inner"]), k.mod(line, f["inner"])
        source, target = (
            k.at(f[w], k.add(k.mul(i, f[f"{w}_outer"]), k.mul(j, f[f"{w}_inner"])))
            for w in ("source", "target")
        )
        with k.loop(0, whole) as v:
            at = k.shifted(v, 6)
            k.store(k.load(VEC, source, at), target, at)
        with k.loop(k.mul(whole, LANES), f["count"]) as n:
            at = k.shifted(n, 2)
            k.store(k.load(F32, source, at), target, at)
    k.done()


def build_split(module: ir.Module, name: str) -> None:
    """Planes by phase, see SPLIT."""
    one = Kernel(module, name, SPLIT)
    k, f = one.k, one.f
    begin, end = one.mine(k.mul(f["channels"], f["phases"]))
    with k.loop(begin, end) as plane:
        channel, phase = k.div(plane, f["phases"]), k.mod(plane, f["phases"])
        source = k.at(f["source"], k.mul(channel, f["source_pitch"]))
        target = k.at(f["target"], k.mul(plane, f["target_pitch"]))
        index = k.at(f["index"], k.shifted(k.mul(phase, f["vectors"]), 6))
        with k.loop(0, f["vectors"]) as v:
            at = k.shifted(v, 6)
            k.store(k.gather(source, k.load(INTS, index, at)), target, at, 64)
    k.done()


def build_pool(module: ir.Module, name: str) -> None:
    """``pool_max`` or ``pool_average``: over the taps of a window, by index."""
    one = Kernel(module, name, POOL)
    k, f = one.k, one.f
    largest = name == "pool_max"
    start = float("-inf") if largest else 0.0
    begin, end = one.mine(f["channels"])
    with k.loop(begin, end) as channel:
        source = k.at(f["source"], k.mul(channel, f["source_pitch"]))
        target = k.at(f["target"], k.mul(channel, f["target_pitch"]))
        with k.loop(0, f["vectors"]) as v:
            at = k.shifted(v, 6)
            result = k.variable(VEC, k.every(start))
            with k.loop(0, f["taps"]) as tap:
                row = k.shifted(k.mul(tap, f["vectors"]), 6)
                found = k.gather(source, k.load(INTS, f["index"], k.add(row, at)), start)
                result.set(_larger(k, result.get(), found) if largest
                           else k.b.fadd(result.get(), found))  # fmt: skip
            value = result.get()
            if not largest:
                value = k.b.fmul(value, k.load(VEC, f["factor"], at))
            k.store(value, target, at, 64)
    k.done()


def _larger(k: Fn, a: Any, b: Any) -> Any:
    """The larger of each two; NaN wins, and stays."""
    kept = k.b.fcmp_ordered(">=", a, b)
    sure = k.b.fcmp_unordered("uno", a, a)
    return k.where(k.b.or_(kept, sure), a, b)


def build_average(module: ir.Module, name: str) -> None:
    """Means of planes, see AVERAGE."""
    one = Kernel(module, name, AVERAGE)
    k, f = one.k, one.f
    begin, end = one.mine(f["channels"])
    factor = k.load(F32, f["factor"])
    whole = k.div(f["pixels"], LANES)
    with k.loop(begin, end) as channel:
        plane = k.at(f["source"], k.mul(channel, f["pitch"]))
        with k.loop(0, f["images"]) as image:
            pixels = k.at(plane, k.shifted(k.mul(image, f["pixels"]), 2))
            sums = k.variable(VEC, k.zero())
            with k.loop(0, whole) as v:
                sums.set(k.b.fadd(sums.get(), k.load(VEC, pixels, k.shifted(v, 6))))
            single = k.variable(F32, total(k, sums.get()))
            with k.loop(k.mul(whole, LANES), f["pixels"]) as n:
                single.set(k.b.fadd(single.get(), k.load(F32, pixels, k.shifted(n, 2))))
            at = k.add(k.mul(image, f["image_step"]), k.mul(channel, f["channel_step"]))
            k.store(k.b.fmul(single.get(), factor), f["target"], at)
    k.done()


def build_spread(module: ir.Module, name: str) -> None:
    """Planes times a number an image and channel, see SPREAD."""
    one = Kernel(module, name, SPREAD)
    k, f = one.k, one.f
    begin, end = one.mine(f["channels"])
    whole = k.div(f["pixels"], LANES)
    with k.loop(begin, end) as channel:
        offset = k.mul(channel, f["pitch"])
        numbers = k.at(f["other"], k.mul(channel, f["other_pitch"]))
        with k.loop(0, f["images"]) as image:
            number = k.load(F32, numbers, k.shifted(image, 2))
            start = k.add(offset, k.shifted(k.mul(image, f["pixels"]), 2))
            source, target = k.at(f["source"], start), k.at(f["target"], start)
            with k.loop(0, whole) as v:
                at = k.shifted(v, 6)
                k.store(k.b.fmul(k.load(VEC, source, at), k.splat(number)), target, at)
            with k.loop(k.mul(whole, LANES), f["pixels"]) as n:
                at = k.shifted(n, 2)
                k.store(k.b.fmul(k.load(F32, source, at), number), target, at)
    k.done()
