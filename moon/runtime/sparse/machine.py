"""Parts of a graph that the engine's kernels run, and what they share."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError
from moon.runtime.sparse.cache import Cache
from moon.runtime.sparse.costs import Costs
from moon.runtime.sparse.division import Native
from moon.runtime.sparse.input import finite
from moon.runtime.sparse.jit import Jit, fingerprint
from moon.runtime.sparse.kept import Kept
from moon.runtime.sparse.kernels import SOURCES
from moon.runtime.sparse.kernels_driver import DRIVER, OPERATION
from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.memory import Guard, Space
from moon.runtime.sparse.pieces import together
from moon.runtime.sparse.plan import Plan
from moon.runtime.sparse.program import Program
from moon.runtime.sparse.team import Team
from moon.runtime.sparse.tuning import Tuning

__all__ = ["Kernels", "Machine"]

Array = NDArray[Any]
Values = dict[str, Array]

# Programs kept, each for a number of images.
_MOST_READY = 4


class Machine:
    """What the engine's parts of one model share: compiler, threads, and whose turn it is.

    Args:
        threads: that run together.
        isa: instruction set.
        guard: see :class:`moon.runtime.sparse.memory.Space`.
        plans: by what convolutions make, instead of those chosen.
        tuning: plans by the number of images, for those without one in ``plans``.

    Attributes:
        watch: told of every run of a program, with the times that :meth:`Team.run` noted.
    """

    def __init__(
        self,
        threads: int,
        isa: str,
        guard: Guard | None,
        plans: Mapping[str, Plan] | None,
        tuning: Tuning | None = None,
    ) -> None:
        self.threads, self._plans, self._tuning = threads, plans or {}, tuning
        self.watch: Callable[[Program, NDArray[np.int64]], None] | None = None
        self.space = Space(guard)
        self.jit = Jit(isa, Cache(), fingerprint=fingerprint(*SOURCES))
        self.costs = Costs.of(self.jit.isa, self.jit.cpu)
        drivers = self.jit.addresses(DRIVER)
        self.team = Team(threads, drivers["lead"], drivers["work"])
        self.reset()

    def plans(self, images: int) -> dict[str, Plan]:
        """Plans to use for so many images, instead of those chosen."""
        tuned = {} if self._tuning is None else self._tuning.plans(images)
        return {**tuned, **self._plans}

    def reset(self) -> None:
        """In a child that was forked: whoever held the lock is not there."""
        self.lock = threading.Lock()

    def close(self) -> None:
        """End the threads, when nothing runs."""
        with self.lock:
            self.team.close()


@dataclass(frozen=True)
class _Ready:
    """A program for one number of images.

    Attributes:
        views: of results that lie in the program's memory as they are read.
    """

    program: Program
    operations: NDArray[np.int64]
    views: Mapping[str, Array]


class Kernels:
    """A part that the engine runs.

    Args:
        part: what it does.
        machine: shared with other parts.
        trusted: what it reads is finite, as its caller has checked.

    Raises:
        ValueError: it is too large for the kernels.
    """

    def __init__(self, part: Native, machine: Machine, *, trusted: bool) -> None:
        self._part, self._machine, self._trusted = part, machine, trusted
        self._source, self._results = part.source, part.results
        given = part.given
        self._each = (given.channels, given.height, given.width)
        # What is wrong shows now, and the first run does not compile.
        first = self._prepare(given.images)
        self._ready = OrderedDict([(given.images, first)])
        lowered = part.lowered
        self._most = (
            given.images if part.fixed else together(lowered.steps, lowered.tensors, first.program)
        )

    def reset(self) -> None:
        """A child that was forked goes on with all of it."""

    def run(self, values: Mapping[str, Array]) -> Values:
        """Its results."""
        images = values[self._source]
        if images.shape[1:] != self._each or images.dtype != np.float32:
            raise BackendError(
                f"ONNX Runtime made {self._source} {images.dtype} {list(images.shape)},"
                f" not float32 {['N', *self._each]}"
            )
        count = len(images)
        if 0 < count <= self._most:
            return self._run(images)
        pieces = [self._run(images[i : i + self._most]) for i in range(0, count, self._most)]
        return {name: self._joined(name, pieces) for name in self._results}

    def _run(self, images: Array) -> Values:
        machine = self._machine
        with machine.lock:
            ready = self._for(len(images))
            ready.program.feed(images)
            self._launch(ready)
            found = {name: self._result(ready, name) for name in self._results}
        read = () if self._trusted else (images,)
        for array in (*read, *found.values()):
            if not finite(array):
                return _spoiled(found, read)
        return found

    def _launch(self, ready: _Ready) -> None:
        team, watch = self._machine.team, self._machine.watch
        if watch is None:
            team.run(ready.operations, owner=ready)
            return
        times = np.zeros((len(ready.operations) + 1, 2), np.int64)
        team.run(ready.operations, times, owner=ready)
        watch(ready.program, times)

    @property
    def programs(self) -> dict[int, Program]:
        """Those that are ready, by the number of images."""
        return {images: ready.program for images, ready in self._ready.items()}

    def prepare(self, images: int, plans: Mapping[str, Plan], kept: Kept) -> _Ready:
        """A program of other plans, for :meth:`use`."""
        return self._prepare(images, plans, kept)

    def use(self, images: int, ready: _Ready) -> None:
        """Run this program from now on, for so many images."""
        with self._machine.lock:
            self._ready[images] = ready

    def _for(self, images: int) -> _Ready:
        ready = self._ready.get(images)
        if ready is None:
            self._ready[images] = ready = self._prepared(images)
            if len(self._ready) > _MOST_READY:
                self._ready.popitem(last=False)
        elif len(self._ready) > 1:
            self._ready.move_to_end(images)
        return ready

    @staticmethod
    def _result(ready: _Ready, name: str) -> Array:
        view = ready.views.get(name)
        return np.array(ready.program.result(name) if view is None else view, order="C")

    def _prepared(self, images: int) -> _Ready:
        try:
            return self._prepare(images)
        except ValueError as error:  # one image is known to fit
            raise BackendError(
                f"{images} images are too many for the engine: {error}",
                remedy="Run fewer at a time, or use --backend onnxruntime",
            ) from error

    def _prepare(
        self, images: int, plans: Mapping[str, Plan] | None = None, kept: Kept | None = None
    ) -> _Ready:
        machine, lowered = self._machine, self._part.lower(images)
        program = Program(
            lowered.steps,
            lowered.tensors,
            self._source,
            self._results,
            machine.costs,
            machine.threads,
            machine.plans(images) if plans is None else plans,
            machine.space,
            kept,
        )
        found = machine.jit.addresses({one.kernel: one.build for one in program.operations})
        rows = [
            {"kernel": found[o.kernel], "record": o.record.address, "meet": int(o.meet)}
            for o in program.operations
        ]
        views = {}
        for name in self._results:
            view = program.result(name)
            if np.may_share_memory(view, program.result(name)):  # a view, not a copy
                views[name] = view
        return _Ready(program, OPERATION.table(rows), views)

    def _joined(self, name: str, pieces: Sequence[Values]) -> Array:
        if pieces:
            return np.concatenate([piece[name] for piece in pieces])
        tensor = self._part.lowered.tensors[name]
        if isinstance(tensor, Planes):
            return np.zeros((0, tensor.channels, tensor.height, tensor.width), np.float32)
        return np.zeros((0, tensor.features), np.float32)


def _spoiled(found: Values, read: Sequence[Array]) -> Values:
    """Results that are NaN for an image of which anything read or made is not finite.

    With zeros left out, some of the rest could look like an answer.
    """
    count = len(next(iter(found.values())))
    spoiled = np.zeros(count, np.bool_)
    for array in (*read, *found.values()):
        spoiled |= ~np.isfinite(array.reshape(count, -1)).all(axis=1)
    for result in found.values():
        result[spoiled] = np.nan
    return found
