"""Kernels over a record: ``name``(record, thread, threads) does share number ``thread``.

Whichever thread takes it: the driver hands out shares, as many as there are threads.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from moon.runtime.sparse.frames import Layout
from moon.runtime.sparse.ir import F32, I64, PTR, Fn

__all__ = ["Kernel"]

_POINTERS = frozenset({
    "source", "target", "residual", "other", "index", "factor", "weights", "bias", "starts",
    "parts", "shifts",
})  # fmt: skip
_FLOATS = frozenset({"low", "high", "fill"})


class Kernel:
    """A function over a record, with its fields read.

    Attributes:
        k: the function.
        f: fields by name; a float as a vector of it.
    """

    def __init__(self, module: ir.Module, name: str, layout: Layout) -> None:
        arguments = [(PTR, "record"), (I64, "thread"), (I64, "threads")]
        self.k = k = Fn(module, name, arguments)
        record = k.arguments["record"]
        self.f: dict[str, Any] = {}
        for field in layout.fields:
            if field in _FLOATS:
                self.f[field] = k.splat(k.load(F32, record, layout[field]))
            else:
                kind = PTR if field in _POINTERS else I64
                self.f[field] = k.load(kind, record, layout[field], 8)

    def mine(self, count: Any) -> tuple[Any, Any]:
        """The contiguous share of 0, ..., count - 1 that is to be done."""
        return self.k.share(count, self.k.arguments["thread"], self.k.arguments["threads"])
