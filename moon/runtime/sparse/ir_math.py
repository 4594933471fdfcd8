"""Functions of vectors that take more than an instruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from moon.runtime.sparse.ir import I32, INTS, LANES, VEC, Fn

__all__ = ["exponential", "total"]

# Between powers of two this large floats are whole numbers: adding it rounds, to even.
_ROUNDS = 1.5 * 2.0**23


def exponential(k: Fn, vector: Any) -> Any:
    """e to the power of each, right to about 1e-7 of itself from -87 to 88; NaN stays NaN.

    Beyond these it is as at the bound: 1.6e-38 or 1.7e38.
    x = n ln 2 + r with r at most ln 2 / 2 in size: a Taylor series in r, times 2 to n.
    """
    x = k.clamp(vector, k.every(-87.0), k.every(88.0))
    raised = k.fma(x, k.every(1.4426950408889634), k.every(_ROUNDS))
    n = k.b.fsub(raised, k.every(_ROUNDS))
    # ln 2 in two parts, the first short, so that n times it is exact.
    r = k.fma(n, k.every(-0.693359375), x)
    r = k.fma(n, k.every(2.12194440e-4), r)
    series = k.every(1 / 5040)
    for term in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        series = k.fma(series, r, k.every(term))
    # NaN has no integer; what becomes of it is undone below.
    known = k.b.fcmp_ordered("==", n, n)
    whole = k.b.fptosi(k.where(known, n, k.zero()), INTS)
    power = k.b.shl(k.b.add(whole, _integers(127)), _integers(23))
    scaled = k.b.fmul(series, k.b.bitcast(power, VEC))
    return k.where(known, scaled, vector)


def total(k: Fn, vector: Any, joined: Callable[[Any, Any], Any] | None = None) -> Any:
    """The sum of sixteen lanes, or what two vectors are joined by; always in the same order."""
    joined = joined or k.b.fadd
    width = LANES
    while width > 1:
        width //= 2
        lanes = [i + width if i < width else i for i in range(LANES)]
        undefined = ir.Constant(VEC, ir.Undefined)
        other = k.b.shuffle_vector(vector, undefined, ir.Constant(INTS, lanes))
        vector = joined(vector, other)
    return k.b.extract_element(vector, ir.Constant(I32, 0))


def _integers(value: int) -> Any:
    return ir.Constant(INTS, [value] * LANES)
