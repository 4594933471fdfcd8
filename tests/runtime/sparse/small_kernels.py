"""Small kernels, name(pointer, vectors), for the tests of what compiles and loads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

_I64, _POINTER = ir.IntType(64), ir.PointerType()
_VECTOR = ir.VectorType(ir.FloatType(), 16)
_TYPE = ir.FunctionType(ir.VoidType(), [_POINTER, _I64])


def _each(module: ir.Module, name: str, count: int, body: Callable[[Any, Any], None]) -> None:
    """``body(builder, pointer)`` for every vector, or ``count`` times for each."""
    function = ir.Function(module, _TYPE, name)
    entry, loop, end = (function.append_basic_block(part) for part in ("entry", "loop", "end"))
    builder = ir.IRBuilder(entry)
    total = builder.mul(function.args[1], ir.Constant(_I64, count))
    builder.cbranch(builder.icmp_unsigned("<", ir.Constant(_I64, 0), total), loop, end)
    builder.position_at_end(loop)
    i = builder.phi(_I64)
    offset = builder.mul(i, ir.Constant(_I64, 64 // count))
    body(builder, builder.gep(function.args[0], [offset], source_etype=ir.IntType(8)))
    following = builder.add(i, ir.Constant(_I64, 1))
    i.add_incoming(ir.Constant(_I64, 0), entry)
    i.add_incoming(following, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, total), loop, end)
    ir.IRBuilder(end).ret_void()


def scaling(name: str, factor: float) -> Callable[[ir.Module], None]:
    """Every float times ``factor`` plus 1."""

    def body(builder: Any, pointer: Any) -> None:
        x = builder.load(pointer, typ=_VECTOR, align=4)
        scaled = builder.fmul(x, ir.Constant(_VECTOR, [factor] * 16))
        builder.store(builder.fadd(scaled, ir.Constant(_VECTOR, [1.0] * 16)), pointer, align=4)

    return lambda module: _each(module, name, 1, body)


def clearing(name: str) -> Callable[[ir.Module], None]:
    """Every float to zero, one by one."""

    def body(builder: Any, pointer: Any) -> None:
        builder.store(ir.Constant(ir.FloatType(), 0.0), pointer, align=4)

    return lambda module: _each(module, name, 16, body)


def calling(name: str, other: str) -> Callable[[ir.Module], None]:
    """Calls a function that is elsewhere."""

    def build(module: ir.Module) -> None:
        intrinsic = other.startswith("llvm.")
        kind = _VECTOR if intrinsic else _POINTER
        callee = ir.Function(module, ir.FunctionType(kind, [kind]), other)

        def body(builder: Any, pointer: Any) -> None:
            x = builder.load(pointer, typ=_VECTOR, align=4) if intrinsic else pointer
            result = builder.call(callee, [x])
            if intrinsic:
                builder.store(result, pointer, align=4)

        _each(module, name, 1, body)

    return build
