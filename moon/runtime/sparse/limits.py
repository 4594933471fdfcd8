"""How many multiply-adds a core of this machine can do: two loops of nothing else.

`registers`: independent sums in registers, no memory at all. `memory`: the same with one operand of
each read from the first cache, aligned, as a convolution's kernel reads its image; no kernel is
faster than that. Both are the best of many short runs, taken between those that are compared.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from moon.runtime.sparse.cache import Cache
from moon.runtime.sparse.jit import Jit, fingerprint

__all__ = ["KINDS", "Limits"]

LANES = 16  # floats in a vector of the kernels; the CPU's may be narrower
SUMS = (3, 4, 6, 8, 10, 12)
TURNS = 40_000
READ = 16 << 10  # bytes that are read over and over
KINDS = ("registers", "memory")


class Limits:
    """Measured over and over; the best counts.

    Args:
        isa: instruction set, "native" for the best there is.

    Attributes:
        isa: the one in use.

    Raises:
        UsageError: there is no such instruction set.
        BackendError, MissingExtraError: this machine cannot compile kernels.
    """

    def __init__(self, isa: str = "native") -> None:
        jit = Jit(isa, Cache(), fingerprint=fingerprint(__name__))
        self.isa = jit.isa
        builds = {
            f"limit_{kind}_{sums}": _builder(f"limit_{kind}_{sums}", sums, kind == "memory")
            for kind in KINDS
            for sums in SUMS
        }
        found = jit.addresses(builds)
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        self._calls = {
            name: [(sums, kind(found[f"limit_{name}_{sums}"])) for sums in SUMS] for name in KINDS
        }
        self._buffer = np.ones(READ // 4 + 64, np.float32)
        self._start = -self._buffer.ctypes.data % 64 + self._buffer.ctypes.data
        self._out = np.empty(LANES, np.float32)
        self._best = dict.fromkeys(KINDS, 0.0)
        self.measure()
        # The numbers of sums that were fast, so that a measurement is short from now on.
        for name, calls in self._calls.items():
            calls.sort(key=lambda one: -self._speed(*one))
            del self._calls[name][2:]

    def measure(self) -> None:
        """A few milliseconds of work."""
        for name, calls in self._calls.items():
            self._best[name] = max(self._best[name], *(self._speed(*one) for one in calls))

    def gmacs(self) -> dict[str, float]:
        """GMAC/s of one core, by kind."""
        return dict(self._best)

    def _speed(self, sums: int, call: Callable[..., None]) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            call(self._start, self._out.ctypes.data, TURNS)
            best = min(best, time.perf_counter() - start)
        return TURNS * sums * LANES / best / 1e9


def _builder(name: str, sums: int, memory: bool) -> Callable[[Any], None]:
    def build(module: Any) -> None:
        _write(module, name, sums, memory)

    return build


def _write(module: Any, name: str, sums: int, memory: bool) -> None:
    """A loop of so many multiply-adds, each to a sum of its own; the sums' sum is stored."""
    from llvmlite import ir

    i8, i64, pointer = ir.IntType(8), ir.IntType(64), ir.PointerType()
    vector = ir.VectorType(ir.FloatType(), LANES)
    kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, i64])
    function = ir.Function(module, kind, name)
    fma = ir.Function(module, ir.FunctionType(vector, [vector] * 3), "llvm.fmuladd.v16f32")
    source, target, turns = function.args
    entry, loop, done = (function.append_basic_block(word) for word in ("entry", "loop", "done"))
    b = ir.IRBuilder(entry)
    one = b.load(source, typ=vector, align=64)
    b.branch(loop)
    b.position_at_end(loop)
    turn = b.phi(i64)
    values = [b.phi(vector) for _ in range(sums)]
    steps = 1 << (READ // (64 * sums)).bit_length() - 1
    row = b.mul(b.and_(turn, ir.Constant(i64, steps - 1)), ir.Constant(i64, 64 * sums))
    place = b.gep(source, [row], source_etype=i8)
    after = []
    for i, value in enumerate(values):
        other = one
        if memory:
            where = b.gep(place, [ir.Constant(i64, 64 * i)], source_etype=i8)
            other = b.load(where, typ=vector, align=64)
        after.append(b.call(fma, [one, other, value]))
    following = b.add(turn, ir.Constant(i64, 1))
    b.cbranch(b.icmp_unsigned("<", following, turns), loop, done)
    turn.add_incoming(ir.Constant(i64, 0), entry)
    turn.add_incoming(following, loop)
    for value, found in zip(values, after, strict=True):
        value.add_incoming(ir.Constant(vector, [0.0] * LANES), entry)
        value.add_incoming(found, loop)
    b.position_at_end(done)
    total = after[0]
    for value in after[1:]:
        total = b.fadd(total, value)
    b.store(total, target, align=4)
    b.ret_void()
