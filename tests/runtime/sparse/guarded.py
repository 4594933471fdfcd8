"""Random convolutions beside pages that cannot be touched.

On the narrowest instruction set there is: with AVX-512 LLVM makes one masked load of a load and a
choice, and lanes that are masked never fault.
"""

from __future__ import annotations

import sys
from typing import Any

from moon.runtime.sparse.cache import Cache
from moon.runtime.sparse.isa import available
from moon.runtime.sparse.jit import Jit, fingerprint
from moon.runtime.sparse.kernels import SOURCES

from .convolving import convolve, error, plans, random_case


def main(guard: Any, first: int, last: int) -> None:
    """Ends the process with 1 where a result is wrong, by a signal where memory is overrun."""
    jit = Jit(available()[-1], Cache(), fingerprint=fingerprint(*SOURCES))
    done = 0
    for seed in range(first, last):
        case = random_case(seed)
        if case is None:
            continue
        expected = case.expected()
        for plan in plans(case, seed):
            print(seed, plan, case.geometry, flush=True)
            threads = 1 + seed % 2
            got = convolve(jit, case, plan, parts=1 + seed % 3, threads=threads, guard=guard)
            if not error(case, got, expected) < 1e-5:
                sys.exit("wrong")
            done += 1
    print("done", done)
