"""A thin layer over llvmlite.ir for writing kernels: bytes, vectors of sixteen floats, loops.

Everything is a value of :mod:`llvmlite.ir`; pointers count in bytes, integers are 64 bits and
unsigned. Sixteen floats are the vector of every kernel: LLVM makes one, two or four registers
of it, as the CPU has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

__all__ = [
    "BITS",
    "F32",
    "I16",
    "I32",
    "I64",
    "INTS",
    "LANES",
    "PTR",
    "VEC",
    "VECTOR_BYTES",
    "VOID",
    "Fn",
    "Var",
]

LANES = 16
VECTOR_BYTES = 4 * LANES
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32, PTR, VOID = ir.FloatType(), ir.PointerType(), ir.VoidType()
VEC, INTS, BITS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(I1, LANES)
POINTERS = ir.VectorType(PTR, LANES)


class Fn:
    """A function being written; statements go where the last block ended.

    Args:
        module: gets the function.
        name: of the function.
        arguments: type and name of each.
    """

    def __init__(
        self, module: ir.Module, name: str, arguments: Sequence[tuple[ir.Type, str]]
    ) -> None:
        self._module = module
        kind = ir.FunctionType(VOID, [type_ for type_, _ in arguments])
        self._function = ir.Function(module, kind, name)
        self.arguments = dict(
            zip((label for _, label in arguments), self._function.args, strict=True)
        )
        self._entry = ir.IRBuilder(self._block("entry"))
        body = self._block("body")
        self._leave = self._entry.branch(body)
        self.b = ir.IRBuilder(body)

    def _block(self, name: str) -> Any:
        return self._function.append_basic_block(name)

    def done(self) -> None:
        """End the function."""
        self.b.ret_void()

    # Integers.

    def number(self, value: Any, kind: ir.Type = I64) -> Any:
        """A constant, or the value itself."""
        return value if isinstance(value, ir.Value) else ir.Constant(kind, value)

    def add(self, a: Any, b: Any) -> Any:
        return self.b.add(self.number(a), self.number(b))

    def sub(self, a: Any, b: Any) -> Any:
        return self.b.sub(self.number(a), self.number(b))

    def mul(self, a: Any, b: Any) -> Any:
        return self.b.mul(self.number(a), self.number(b))

    def div(self, a: Any, b: Any) -> Any:
        return self.b.udiv(self.number(a), self.number(b))

    def mod(self, a: Any, b: Any) -> Any:
        return self.b.urem(self.number(a), self.number(b))

    def shifted(self, a: Any, left: int) -> Any:
        """``a`` times 2 to ``left``, which may be negative."""
        if left >= 0:
            return self.b.shl(a, self.number(left, a.type))
        return self.b.lshr(a, self.number(-left, a.type))

    def low(self, a: Any, bits: int) -> Any:
        """The lowest bits of ``a``."""
        return self.b.and_(a, self.number((1 << bits) - 1, a.type))

    def compare(self, a: Any, how: str, b: Any) -> Any:
        """Two integers, such as with "<"."""
        return self.b.icmp_unsigned(how, self.number(a), self.number(b))

    def share(self, count: Any, which: Any, of: Any) -> tuple[Any, Any]:
        """The contiguous part number ``which`` of ``of`` parts of 0, ..., count - 1."""
        return (
            self.div(self.mul(count, which), of),
            self.div(self.mul(count, self.add(which, 1)), of),
        )

    # Memory.

    def at(self, pointer: Any, offset: Any) -> Any:
        """A pointer so many bytes on."""
        if isinstance(offset, int) and offset == 0:
            return pointer
        return self.b.gep(pointer, [self.number(offset)], source_etype=I8)

    def load(self, kind: ir.Type, pointer: Any, offset: Any = 0, align: int = 4) -> Any:
        """Any type from memory."""
        return self.b.load(self.at(pointer, offset), typ=kind, align=align)

    def store(self, value: Any, pointer: Any, offset: Any = 0, align: int = 4) -> None:
        """To memory."""
        self.b.store(value, self.at(pointer, offset), align=align)

    def wide(self, kind: ir.Type, pointer: Any, offset: Any = 0) -> Any:
        """An unsigned integer of any type from memory, as 64 bits."""
        return self.b.zext(self.load(kind, pointer, offset, kind.width // 8), I64)

    def prefetch(self, pointer: Any, offset: Any = 0) -> None:
        """Bring a line near before it is read. The address need not be valid."""
        near = [ir.Constant(I32, value) for value in (0, 3, 1)]
        function = self._intrinsic("llvm.prefetch.p0", VOID, [PTR, I32, I32, I32])
        self.b.call(function, [self.at(pointer, offset), *near])

    # Vectors.

    def zero(self) -> Any:
        return self.every(0.0)

    def every(self, value: float) -> Any:
        """A number in every lane."""
        return ir.Constant(VEC, [value] * LANES)

    def splat(self, scalar: Any) -> Any:
        """A scalar in every lane."""
        undefined = ir.Constant(VEC, ir.Undefined)
        return self.lane(self.b.insert_element(undefined, scalar, ir.Constant(I32, 0)), 0)

    def first(self, vector: Any, kind: ir.VectorType) -> Any:
        """The first lanes of a vector, as many as a narrower type has."""
        if kind.count == vector.type.count:
            return vector
        undefined = ir.Constant(vector.type, ir.Undefined)
        lanes = ir.Constant(ir.VectorType(I32, kind.count), list(range(kind.count)))
        return self.b.shuffle_vector(vector, undefined, lanes)

    def lane(self, vector: Any, which: int) -> Any:
        """All lanes as one of them."""
        undefined = ir.Constant(vector.type, ir.Undefined)
        return self.b.shuffle_vector(vector, undefined, ir.Constant(INTS, [which] * LANES))

    def opaque(self, constant: Any) -> Any:
        """A vector of integers that LLVM does not know, in a register from the beginning on."""
        self._entry.position_before(self._leave)
        kind = ir.FunctionType(constant.type, [constant.type])
        return self._entry.asm(kind, "", "=v,0", [constant], side_effect=False)

    def permuted(self, vector: Any, indices: Any) -> Any:
        """Lanes by indices, by the instruction for it; AVX-512 only."""
        function = self._intrinsic("llvm.x86.avx512.permvar.sf.512", VEC, [VEC, INTS])
        return self.b.call(function, [vector, indices])

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """``a b + c``, rounded once where the CPU can; nothing is called where it cannot."""
        name = f"llvm.fmuladd.v{a.type.count}f32"
        function = self._intrinsic(name, a.type, [a.type] * 3)
        return self.b.call(function, [a, b, c])

    def mask(self, bits: Any) -> Any:
        """Sixteen bits of an I16 as a vector of truth values, lane 0 the lowest."""
        return self.b.bitcast(bits, BITS)

    def multiples(self, step: Any) -> Any:
        """0, step, 2 step, ... of a 64-bit integer, as sixteen of 32 bits."""
        every = self._every_int(step)
        return self.b.mul(every, ir.Constant(INTS, list(range(LANES))))

    def less(self, lanes: Any, bound: Any) -> Any:
        """Which of sixteen integers are below a signed 64-bit one, itself of 32 bits in size."""
        return self.b.icmp_signed("<", lanes, self._every_int(bound))

    def below(self, bound: Any) -> Any:
        """The first lanes, so many; none where it is negative."""
        return self.less(ir.Constant(INTS, list(range(LANES))), bound)

    def _every_int(self, value: Any) -> Any:
        undefined = ir.Constant(INTS, ir.Undefined)
        single = self.b.insert_element(undefined, self.b.trunc(value, I32), ir.Constant(I32, 0))
        return self.lane(single, 0)

    def load_where(self, mask: Any, pointer: Any, offset: Any, other: Any) -> Any:
        """A vector at any address; of lanes that a mask leaves out nothing is read."""
        if mask is None:
            return self.load(VEC, pointer, offset)
        function = self._intrinsic("llvm.masked.load.v16f32.p0", VEC, [PTR, I32, BITS, VEC])
        return self.b.call(function, [self.at(pointer, offset), ir.Constant(I32, 4), mask, other])

    def store_where(self, mask: Any, value: Any, pointer: Any, offset: Any) -> None:
        """A vector to any address; of lanes that a mask leaves out nothing is written."""
        if mask is None:
            self.store(value, pointer, offset)
            return
        function = self._intrinsic("llvm.masked.store.v16f32.p0", VOID, [VEC, PTR, I32, BITS])
        self.b.call(function, [value, self.at(pointer, offset), ir.Constant(I32, 4), mask])

    def where(self, mask: Any, yes: Any, no: Any) -> Any:
        return self.b.select(mask, yes, no)

    def clamp(self, vector: Any, low: Any, high: Any) -> Any:
        """Between two vectors; NaN stays NaN."""
        raised = self.b.select(self.b.fcmp_ordered("<", vector, low), low, vector)
        return self.b.select(self.b.fcmp_ordered(">", raised, high), high, raised)

    def gather(self, pointer: Any, indices: Any, missing: float = 0.0) -> Any:
        """Floats at sixteen int32 indices; where one is negative nothing is read."""
        valid = self.b.icmp_signed(">=", indices, ir.Constant(INTS, [0] * LANES))
        pointers = self.b.gep(pointer, [indices], source_etype=F32)
        pointers.type = POINTERS
        name = "llvm.masked.gather.v16f32.v16p0"
        function = self._intrinsic(name, VEC, [POINTERS, I32, BITS, VEC])
        return self.b.call(function, [pointers, ir.Constant(I32, 4), valid, self.every(missing)])

    def _intrinsic(self, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> Any:
        found = self._module.globals.get(name)
        if found is None:
            found = ir.Function(self._module, ir.FunctionType(result, arguments), name)
        return found

    # Control.

    def variable(self, kind: ir.Type, value: Any = None) -> Var:
        """A slot that LLVM makes a register of."""
        self._entry.position_before(self._leave)
        slot = Var(self.b, self._entry.alloca(kind), kind)
        if value is not None:
            slot.set(value)
        return slot

    @contextmanager
    def loop(self, start: Any, stop: Any) -> Iterator[Any]:
        """From ``start`` to below ``stop``; not at all when there is nothing."""
        start, stop = self.number(start), self.number(stop)
        before, body, after = self.b.block, self._block("loop"), self._block("after")
        self.b.cbranch(self.b.icmp_unsigned("<", start, stop), body, after)
        self.b.position_at_end(body)
        i = self.b.phi(I64)
        i.add_incoming(start, before)
        yield i
        following = self.add(i, 1)
        i.add_incoming(following, self.b.block)
        self.b.cbranch(self.b.icmp_unsigned("<", following, stop), body, after)
        self.b.position_at_end(after)

    @contextmanager
    def forever(self) -> Iterator[Callable[[], None]]:
        """Until ``leave()``, which ends the block it is called in."""
        body, after = self._block("again"), self._block("after")
        self.b.branch(body)
        self.b.position_at_end(body)

        def leave() -> None:
            self.b.branch(after)

        yield leave
        self.b.branch(body)
        self.b.position_at_end(after)

    @contextmanager
    def when(self, condition: Any) -> Iterator[None]:
        """Only if the condition holds."""
        yes, after = self._block("yes"), self._block("after")
        self.b.cbranch(condition, yes, after)
        self.b.position_at_end(yes)
        yield
        if not self.b.block.is_terminated:
            self.b.branch(after)
        self.b.position_at_end(after)

    # Threads.

    def call(self, function: Any, kind: ir.FunctionType, arguments: Sequence[Any]) -> Any:
        """Through an address."""
        return self.b.call(_Callee(function, kind), arguments)

    def succeeded(self, result: Any) -> Any:
        """Whether a C function returned 0."""
        return self.b.icmp_unsigned("==", result, ir.Constant(I32, 0))

    def look(self, pointer: Any, order: str = "acquire") -> Any:
        """What another thread may have written, and all it wrote before."""
        return self.b.load_atomic(pointer, order, 8, typ=I64)

    def tell(self, value: Any, pointer: Any) -> None:
        """What others may look at, in one order for all threads."""
        self.b.atomic_rmw("xchg", pointer, value, "seq_cst")

    def count(self, pointer: Any, order: str = "acq_rel", *, down: bool = False) -> Any:
        """One more, or less, seen by all with everything written before; how many there were."""
        return self.b.atomic_rmw("sub" if down else "add", pointer, self.number(1), order)

    def pause(self) -> None:
        """Tell the core that this is a wait."""
        if "86" in self._module.triple:
            self.b.call(self._intrinsic("llvm.x86.sse2.pause", VOID, []), [])
        elif "aarch64" in self._module.triple:
            self.b.call(self._intrinsic("llvm.aarch64.hint", VOID, [I32]), [ir.Constant(I32, 1)])


class _Callee:
    """A pointer that says what function it points to; llvmlite asks for no more of a callee."""

    def __init__(self, pointer: Any, kind: ir.FunctionType) -> None:
        self.type, self.function_type = pointer.type, kind
        self.get_reference = pointer.get_reference


class Var:
    """A local variable of a kernel."""

    def __init__(self, builder: ir.IRBuilder, slot: Any, kind: ir.Type) -> None:
        self._builder, self._slot, self._kind = builder, slot, kind

    def get(self) -> Any:
        return self._builder.load(self._slot, typ=self._kind)

    def set(self, value: Any) -> None:
        self._builder.store(value, self._slot)
