"""Programs of several sets of plans, run by turns within the whole network."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.engine import SparseEngine
from moon.runtime.sparse.kept import Kept
from moon.runtime.sparse.machine import Kernels
from moon.runtime.sparse.plan import Plan
from moon.runtime.sparse.program import Program
from moon.runtime.sparse.timing import watching

__all__ = ["Stage", "by_turns"]

Plans = Mapping[str, Plan]
Array = NDArray[Any]

# Runs of a turn that are not counted, as they find the caches of another program; and that are.
_SETTLE, _COUNTED = 1, 3
# Turns after which more would tell little.
_MOST = 100


class Stage:
    """An engine whose convolutions can be given other plans, and its input.

    Args:
        engine: that runs a part of its model at least.
        feeds: the input.

    Attributes:
        engine: as given.
        images: in a run of a program.
        programs: of the parts, with the plans they had first.
        kept: convolutions that are ready.
    """

    def __init__(self, engine: SparseEngine, feeds: Mapping[str, Array]) -> None:
        self.engine, self._feeds = engine, feeds
        assert engine.machine is not None
        self._machine = engine.machine
        with watching(self._machine) as spent:
            engine.run_all(feeds)
        ran = {id(program) for program, _ in spent.programs.values()}
        parts = [part for part in engine.parts if isinstance(part, Kernels)]
        # A batch may be run in pieces of several sizes: the largest counts.
        sizes = [
            max(images for images, program in part.programs.items() if id(program) in ran)
            for part in parts
        ]
        self.images = sizes[0]
        self.kept = Kept()
        self._parts = [part for part, size in zip(parts, sizes, strict=True) if size == sizes[0]]
        self.programs: list[Program] = [part.programs[self.images] for part in self._parts]

    def prepared(self, plans: Plans) -> Callable[[], None]:
        """Programs of these plans; the result puts them in use."""
        ready = [(part, part.prepare(self.images, plans, self.kept)) for part in self._parts]

        def use() -> None:
            for part, one in ready:
                part.use(self.images, one)

        return use

    def run(self) -> dict[str, float]:
        """Seconds of each layer in a run, by what it makes."""
        with watching(self._machine) as spent:
            self.engine.run_all(self._feeds)
        return spent.by_target()

    def seconds(self) -> float:
        """Of a whole run."""
        start = time.perf_counter()
        self.engine.run_all(self._feeds)
        return time.perf_counter() - start


def by_turns(
    sides: Sequence[Callable[[], Callable[[], dict[str, float]]]], until: float, fewest: int
) -> list[dict[str, NDArray[np.float64]]]:
    """Run sides by turns, every second round in the other order.

    Args:
        sides: each makes itself ready and returns a run, which gives seconds by name.
        until: on the clock of ``time.perf_counter``.
        fewest: rounds, whatever the clock says; there are a hundred at most.

    Returns:
        For each side the least of each turn by name, [rounds].
    """
    turns: list[list[dict[str, float]]] = [[] for _ in sides]
    while len(turns[0]) < (_MOST if time.perf_counter() < until else fewest):
        order = range(len(sides))
        for i in order if len(turns[0]) % 2 == 0 else reversed(order):
            run = sides[i]()
            for _ in range(_SETTLE):
                run()
            runs = [run() for _ in range(_COUNTED)]
            turns[i].append({name: min(one[name] for one in runs) for name in runs[0]})
    return [{name: np.array([turn[name] for turn in side]) for name in side[0]} for side in turns]
