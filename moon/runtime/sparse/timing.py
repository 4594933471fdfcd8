"""Times of a program's operations, gathered by layer.

A layer is a node of the graph with what belongs to it: frames made for it before, and what takes
its result out of one after. A frame that several read counts to the first of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.machine import Machine
from moon.runtime.sparse.program import Program
from moon.runtime.sparse.steps import Framed, Step, Unframed

__all__ = ["Group", "Spent", "groups", "watching"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """Operations of one layer; they follow each other.

    Attributes:
        step: the layer itself.
        target: name of what it makes.
        operations: their places in the program.
        around: of those the ones that only put numbers into frames and take them out.
    """

    step: Step
    target: str
    operations: range
    around: tuple[int, ...]


def groups(program: Program) -> list[Group]:
    """The layers of a program, in order."""
    found: list[Group] = []
    waiting: list[int] = []
    start = end = 0
    for step, count in program.steps:
        mine = range(end, end + count)
        end += count
        if isinstance(step, Framed):
            waiting += mine
            continue
        if isinstance(step, Unframed):
            last = found.pop()
            around = (*last.around, *mine)
            found.append(Group(last.step, step.target, range(last.operations.start, end), around))
        else:
            found.append(Group(step, step.target, range(start, end), tuple(waiting)))
        start, waiting = end, []
    return found


@dataclass
class Spent:
    """What one whole run took, in seconds.

    Attributes:
        programs: those that ran, each with the seconds of its operations added up.
        runs: how often each ran, for pieces of a batch.
    """

    programs: dict[int, tuple[Program, Floats]] = field(default_factory=dict)
    runs: dict[int, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of all operations."""
        return float(sum(times.sum() for _, times in self.programs.values()))

    def by_target(self) -> dict[str, float]:
        """Of each layer, by what it makes."""
        found: dict[str, float] = {}
        for program, times in self.programs.values():
            for group in groups(program):
                at = slice(group.operations.start, group.operations.stop)
                found[group.target] = found.get(group.target, 0.0) + float(times[at].sum())
        return found


@contextmanager
def watching(machine: Machine) -> Iterator[Spent]:
    """Note what this thread's runs take, until the block ends."""
    spent, mine = Spent(), threading.get_ident()

    def watch(program: Program, times: NDArray[np.int64]) -> None:
        if threading.get_ident() != mine:
            return
        clock = times[:, 0] * 1_000_000_000 + times[:, 1]
        seconds = np.diff(clock) / 1e9
        before = spent.programs.get(id(program))
        total = seconds if before is None else before[1] + seconds
        spent.programs[id(program)] = (program, total)
        spent.runs[id(program)] = spent.runs.get(id(program), 0) + 1

    machine.watch = watch
    try:
        yield spent
    finally:
        machine.watch = None
