from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("llvmlite")
from llvmlite import ir

from moon.runtime.sparse.elf import read_symbols
from moon.runtime.sparse.isa import llvm
from tests.runtime.sparse.small_kernels import calling, scaling


def test_symbols_of_an_object_and_of_damaged_ones() -> None:
    module = ir.Module("m")
    calling("k", "puts")(module)
    scaling("k2", 2.0)(module)
    machine = llvm().Target.from_default_triple().create_target_machine(jit=True)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    data = bytes(machine.emit_object(llvm().parse_assembly(str(module))))
    symbols = read_symbols(data)
    assert symbols.functions == {"k", "k2"}
    assert symbols.missing == {"puts"} and not symbols.others
    for end in range(len(data) - 1):
        with pytest.raises(ValueError, match=r"ELF|truncated|damaged"):
            read_symbols(data[:end])
    rng = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 4):
            damaged[at] = rng.integers(256)
        try:
            read_symbols(bytes(damaged))
        except ValueError:
            continue
