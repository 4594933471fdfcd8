"""Kernels that move and pool planes.

Each is ``name``(record, thread, threads) and does its contiguous share of the work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir

from moon.runtime.sparse.frames import Layout
from moon.runtime.sparse.ir import F32, I64, INTS, LANES, VEC, Fn
from moon.runtime.sparse.ir_math import total
from moon.runtime.sparse.kernel import Kernel

__all__ = [
    "COPY", "FRAME", "POOL", "REDUCE", "SPREAD", "UNFRAME", "build_copy", "build_frame",
    "build_pool", "build_reduce", "build_spread", "build_unframe",
]  # fmt: skip

# Lines of floats: target[i outer][j inner] = source[i][j], steps in bytes, ``count`` floats each.
COPY = Layout(
    "source", "target", "outer", "inner", "count",
    "source_outer", "source_inner", "target_outer", "target_inner",
)  # fmt: skip
# Planes by phase with margins of ``fill``, see moon.runtime.sparse.frame: plane c * phases + p of
# the target is made of plane c of the source by parts [phases, 3]; step: stride between columns.
# source_row and source_image in bytes; pitch, lead, whole (of a plane) in floats.
FRAME = Layout(
    "source", "target", "channels", "phases", "images", "rows", "pitch", "lead", "whole",
    "source_pitch", "source_row", "source_image", "target_pitch", "step", "parts", "fill",
)  # fmt: skip
# Rows of a frame as planes without margins; row and image in bytes. The residual is as the target.
UNFRAME = Layout(
    "source", "target", "residual", "channels", "images", "height", "width", "row", "image",
    "source_pitch", "target_pitch", "low", "high",
)  # fmt: skip
# Windows over a frame, taps at shifts [taps] in bytes; factor [pixels] multiplies an average.
POOL = Layout(
    "source", "target", "channels", "images", "height", "width", "row", "image",
    "source_pitch", "target_pitch", "taps", "shifts", "factor",
)  # fmt: skip
# Over the pixels of an image: a number for each image and channel, steps in bytes; factor
# multiplies an average.
REDUCE = Layout(
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


def build_frame(module: ir.Module, name: str) -> None:
    """``frame_1``, ``frame_2``, ``frame_n``: by the stride between columns, see FRAME."""
    one = Kernel(module, name, FRAME)
    k, f = one.k, one.f
    load = {"frame_1": _next_to_each_other, "frame_2": _every_second}.get(name, _every_nth)
    begin, end = one.mine(k.mul(f["channels"], f["phases"]))
    with k.loop(begin, end) as plane:
        channel, phase = k.div(plane, f["phases"]), k.mod(plane, f["phases"])
        part = k.at(f["parts"], k.mul(phase, 24))
        first, columns, rows = (k.load(I64, part, 8 * i, 8) for i in range(3))
        source = k.at(f["source"], k.add(k.mul(channel, f["source_pitch"]), k.shifted(first, 2)))
        target = k.at(f["target"], k.mul(plane, f["target_pitch"]))
        with k.loop(0, k.div(f["lead"], LANES)) as v:
            k.store(f["fill"], target, k.shifted(v, 6))
        vectors = k.div(k.add(f["pitch"], LANES - 1), LANES)
        with k.loop(0, f["images"]) as image, k.loop(0, f["rows"]) as row:
            there = k.b.select(k.compare(row, "<", rows), columns, k.number(0))
            offset = k.add(k.mul(image, f["source_image"]), k.mul(row, f["source_row"]))
            place = k.mul(k.add(k.mul(image, f["rows"]), row), f["pitch"])
            to = k.at(target, k.shifted(k.add(f["lead"], place), 2))
            # What is written beyond the row's end is written again by the next row.
            with k.loop(0, vectors) as v:
                k.store(load(one, k.at(source, offset), there, v), to, k.shifted(v, 6))
        behind = k.add(f["lead"], k.mul(k.mul(f["images"], f["rows"]), f["pitch"]))
        left = k.div(k.add(k.sub(f["whole"], behind), LANES - 1), LANES)
        with k.loop(0, left) as v:
            k.store(f["fill"], k.at(target, k.shifted(behind, 2)), k.shifted(v, 6))
    k.done()


# Vector ``v`` of a row with ``there`` numbers; ``fill`` for what is beyond them.


def _next_to_each_other(one: Kernel, source: Any, there: Any, v: Any) -> Any:
    k = one.k
    mask = k.below(k.sub(there, k.shifted(v, 4)))
    return k.load_where(mask, source, k.shifted(v, 6), one.f["fill"])


def _every_second(one: Kernel, source: Any, there: Any, v: Any) -> Any:
    k = one.k
    at, left = k.shifted(v, 7), k.sub(there, k.shifted(v, 5))
    near = k.load_where(k.below(left), source, at, one.f["fill"])
    far = k.load_where(k.below(k.sub(left, LANES)), source, k.add(at, 64), one.f["fill"])
    return k.b.shuffle_vector(near, far, ir.Constant(INTS, list(range(0, 2 * LANES, 2))))


def _every_nth(one: Kernel, source: Any, there: Any, v: Any) -> Any:
    k, step = one.k, one.f["step"]
    lanes = k.multiples(step)
    start = k.mul(k.shifted(v, 4), step)
    known = k.less(lanes, k.sub(there, start))
    indices = k.where(known, lanes, ir.Constant(INTS, [-1] * LANES))
    found = k.gather(k.at(source, k.shifted(start, 2)), indices)
    return k.where(known, found, one.f["fill"])


def _lines(one: Kernel, channel: Any, write: Callable[[Any, Any, Any, Any], None]) -> None:
    """Over the rows of a target without margins, by vectors: write(source, offset, at, mask).

    The last vector of a row overlaps the one before it, or is masked where there is none.
    """
    k, f = one.k, one.f
    source = k.at(f["source"], k.mul(channel, f["source_pitch"]))
    whole, left = k.div(f["width"], LANES), k.mod(f["width"], LANES)
    with k.loop(0, f["images"]) as image, k.loop(0, f["height"]) as y:
        here = k.at(source, k.add(k.mul(image, f["image"]), k.mul(y, f["row"])))
        line = k.mul(k.add(k.mul(image, f["height"]), y), f["width"])
        offset = k.add(k.mul(channel, f["target_pitch"]), k.shifted(line, 2))
        with k.loop(0, whole) as v:
            write(here, offset, k.shifted(v, 6), None)
        with k.when(k.compare(left, "!=", 0)):
            several = k.compare(whole, "!=", 0)
            with k.when(several):
                write(here, offset, k.shifted(k.sub(f["width"], LANES), 2), None)
            with k.when(k.b.not_(several)):
                write(here, offset, k.number(0), k.below(left))


def build_unframe(module: ir.Module, name: str) -> None:
    """``unframe`` and ``unframe_add``, see UNFRAME."""
    one = Kernel(module, name, UNFRAME)
    k, f = one.k, one.f

    def write(source: Any, offset: Any, at: Any, mask: Any) -> None:
        value, to = k.load(VEC, source, at), k.add(offset, at)
        if name == "unframe_add":
            added = k.load_where(mask, f["residual"], to, k.zero())
            value = k.b.fadd(value, added)
        k.store_where(mask, k.clamp(value, f["low"], f["high"]), f["target"], to)

    begin, end = one.mine(f["channels"])
    with k.loop(begin, end) as channel:
        _lines(one, channel, write)
    k.done()


def build_pool(module: ir.Module, name: str) -> None:
    """``pool_max`` or ``pool_average``, see POOL."""
    one = Kernel(module, name, POOL)
    k, f = one.k, one.f
    largest = name == "pool_max"
    begin, end = one.mine(f["channels"])
    factors = f["factor"]

    def write(source: Any, offset: Any, at: Any, mask: Any) -> None:
        result = k.variable(VEC, k.every(float("-inf") if largest else 0.0))
        with k.loop(0, f["taps"]) as tap:
            shift = k.load(I64, f["shifts"], k.shifted(tap, 3), 8)
            found = k.load(VEC, source, k.add(shift, at))
            result.set(_larger(k, result.get(), found) if largest
                       else k.b.fadd(result.get(), found))  # fmt: skip
        value, to = result.get(), k.add(offset, at)
        if not largest:
            pixel = k.sub(to, k.mul(channel, f["target_pitch"]))
            value = k.b.fmul(value, k.load(VEC, factors, pixel))
        k.store_where(mask, value, f["target"], to)

    with k.loop(begin, end) as channel:
        _lines(one, channel, write)
    k.done()


def _larger(k: Fn, a: Any, b: Any) -> Any:
    """The larger of each two; NaN wins, and stays."""
    kept = k.b.fcmp_ordered(">=", a, b)
    sure = k.b.fcmp_unordered("uno", a, a)
    return k.where(k.b.or_(kept, sure), a, b)


def build_reduce(module: ir.Module, name: str) -> None:
    """``reduce_average`` or ``reduce_max``, see REDUCE."""
    one = Kernel(module, name, REDUCE)
    k, f = one.k, one.f
    largest = name == "reduce_max"
    joined: Callable[[Any, Any], Any] = partial(_larger, k) if largest else k.b.fadd
    start = k.every(float("-inf") if largest else 0.0)
    begin, end = one.mine(f["channels"])
    factor = k.load(F32, f["factor"])
    whole, left = k.div(f["pixels"], LANES), k.mod(f["pixels"], LANES)
    with k.loop(begin, end) as channel:
        plane = k.at(f["source"], k.mul(channel, f["pitch"]))
        with k.loop(0, f["images"]) as image:
            pixels = k.at(plane, k.shifted(k.mul(image, f["pixels"]), 2))
            found = k.variable(VEC, start)
            with k.loop(0, whole) as v:
                found.set(joined(found.get(), k.load(VEC, pixels, k.shifted(v, 6))))
            with k.when(k.compare(left, "!=", 0)):
                rest = k.load_where(k.below(left), pixels, k.shifted(whole, 6), start)
                found.set(joined(found.get(), rest))
            at = k.add(k.mul(image, f["image_step"]), k.mul(channel, f["channel_step"]))
            single = total(k, found.get(), joined)
            k.store(single if largest else k.b.fmul(single, factor), f["target"], at)
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
