"""The sparse CPU engine: any ONNX image classifier, faster the sparser it is."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError, UsageError
from moon.runtime.cores import usable_cores
from moon.runtime.sparse.opening import Options, open_model

if TYPE_CHECKING:
    from moon.runtime.sparse.machine import Kernels, Machine
    from moon.runtime.sparse.memory import Guard
    from moon.runtime.sparse.plan import Plan
    from moon.runtime.sparse.profile import Profile
    from moon.runtime.sparse.session import Session
    from moon.runtime.sparse.tuning import Tuning

__all__ = ["SparseEngine"]

Array = NDArray[Any]

_MOST_THREADS = 1024
_engines: weakref.WeakSet[SparseEngine] = weakref.WeakSet()


def _silent(message: str) -> None:
    """Nobody is told."""


class SparseEngine:
    """An ONNX classifier on the CPU, its zeros left out.

    What the engine cannot run, or not faster, it hands over to ONNX Runtime: some of the nodes, or
    the whole model. Safe for several threads; a process that was forked can go on with it.

    Args:
        model: the file, or its bytes.
        threads: that run together; 0 for as many cores as this process may use.
        isa: instruction set, "native" for the best there is.
        force: let the engine run all it can, worth it or not, and on any system.
        plans: how convolutions are done, by the tensors they make, instead of what is chosen.
        tuning: what :func:`moon.runtime.sparse.tune.tune` found for this model on this CPU.
        spin: let idle threads of ONNX Runtime spin between runs, where it runs the whole model.
            Other threads always sleep then.
        warn: told, in a line, of what may make it slower than expected.
        guard: for finding errors, see :class:`moon.runtime.sparse.memory.Space`.

    Attributes:
        threads: that run together.
        isa: the instruction set in use; "" where ONNX Runtime runs the whole model.
        handed_over: what ONNX Runtime runs, or the first node of it, and why; "" for nothing.
        layers: convolutions and linear layers that the engine runs, and of how many.
        inputs: what must be fed.
        optional, outputs: names of what may be fed, and of what is returned.

    Raises:
        BackendError: neither the engine nor ONNX Runtime can read the model.
        UsageError: no such number of threads, or instruction set.
        MissingExtraError: llvmlite is not installed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        *,
        threads: int = 1,
        isa: str = "native",
        force: bool = False,
        plans: Mapping[str, Plan] | None = None,
        spin: bool = False,
        warn: Callable[[str], None] = _silent,
        guard: Guard | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self.threads = _threads(threads, warn)
        options = Options(
            threads=self.threads, isa=isa, force=force, plans=plans, spin=spin, guard=guard,
            warn=warn, tuning=tuning,
        )  # fmt: skip
        opened = open_model(model if isinstance(model, bytes) else os.fspath(model), options)
        self._parts, self._machine = opened.parts, opened.machine
        self.inputs, self.outputs = opened.inputs, opened.outputs
        self.optional = frozenset(one.name for one in opened.optional)
        self.handed_over, self.layers = opened.handed_over, opened.layers
        self._constants = opened.constants
        self._required = {one.name for one in self.inputs}
        self._optional = opened.optional
        # The caller's own array, or what the model keeps, is not given away.
        named = self._required | self.optional | set(self._constants)
        self._copied = named.intersection(self.outputs)
        self._closed = False
        _engines.add(self)

    @property
    def isa(self) -> str:
        """See the class."""
        return "" if self._machine is None else self._machine.jit.isa

    @property
    def parts(self) -> Sequence[Kernels | Session]:
        """What runs one after the other, for those that measure it."""
        return self._parts

    @property
    def machine(self) -> Machine | None:
        """What the engine's own parts share; None where ONNX Runtime runs the whole model."""
        return self._machine

    def run(self, x: Array | Mapping[str, Array]) -> Array | list[Array]:
        """All outputs for a batch.

        Args:
            x: the input, or inputs by name.

        Returns:
            One output as an array, several as a list in the graph's order. Where what the engine
            computes of an image overflows, all of it is NaN.

        Raises:
            UsageError: an input has another type or shape, or one that must be fed holds NaN or
                infinity; or there is no such input.
            BackendError: ONNX Runtime fails at its part, there is no memory for the batch, or the
                engine is closed.
        """
        if not isinstance(x, Mapping):
            if len(self.inputs) != 1:
                names = ", ".join(one.name for one in self.inputs)
                raise UsageError(
                    f"the model has {len(self.inputs)} inputs: {names}",
                    remedy="Pass a dict of arrays by these names",
                )
            x = {self.inputs[0].name: x}
        values = self.run_all(x)
        if len(self.outputs) == 1:
            return values[self.outputs[0]]
        return [self._own(values[name], i) for i, name in enumerate(self.outputs)]

    def run_all(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """As :meth:`run`, the outputs by name and in order."""
        if self._closed:
            raise BackendError("the engine is closed", remedy="Open the model again")
        values = self._checked(feeds)
        try:
            return self._computed(values)
        except MemoryError as error:
            raise BackendError(
                "there is not enough memory for so many images",
                remedy="Run fewer at a time, or on a larger machine",
            ) from error

    def profile(self, x: Array | Mapping[str, Array], *, runs: int = 50) -> Profile:
        """Where the time of a run goes, layer by layer.

        Args:
            x: as of :meth:`run`.
            runs: whole runs that are timed; medians count.

        Raises:
            UsageError: as :meth:`run`, or ``runs`` is less than 1.
            BackendError: as :meth:`run`.
        """
        from moon.runtime.sparse.profile import profiled

        self.run(x)  # refuses what cannot be run, and compiles
        feeds = x if isinstance(x, Mapping) else {self.inputs[0].name: x}
        return profiled(self, self._checked(feeds), runs)

    def close(self) -> None:
        """End the threads. There is no run after that."""
        self._closed = True
        if self._machine is not None:
            self._machine.close()

    def _computed(self, values: dict[str, Array]) -> dict[str, Array]:
        if self._machine is None:  # ONNX Runtime makes all of it, in order
            return self._parts[0].run(values)
        for part in self._parts:
            values.update(part.run(values))
        for name in self._copied:
            values[name] = np.array(values.get(name, self._constants.get(name)))
        return {name: values[name] for name in self.outputs}

    def _own(self, value: Array, i: int) -> Array:
        """One output; a graph may name the same twice."""
        return np.array(value) if self.outputs[i] in self.outputs[:i] else value

    def _checked(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        values = dict(feeds)
        if values.keys() != self._required and not self._known(values):
            names = ", ".join([*(one.name for one in self.inputs), *sorted(self.optional)])
            raise UsageError(f"the inputs are {names}, not {', '.join(feeds) or 'none'}")
        for name, x in values.items():
            if type(x) is not np.ndarray or not x.flags.c_contiguous:
                values[name] = np.asarray(x, order="C")
        for one in self.inputs:
            one.check(values[one.name])
        for one in self._optional if len(values) > len(self._required) else ():
            if one.name in values:
                one.check(values[one.name])
        return values

    def _known(self, values: Mapping[str, Array]) -> bool:
        """Whether all is there that must be, and nothing that there is not."""
        return self._required <= values.keys() <= self._required | self.optional

    def _forked(self) -> None:
        for part in self._parts:
            part.reset()
        if self._machine is not None:
            self._machine.reset()


def _threads(threads: int, warn: Callable[[str], None]) -> int:
    if not 0 <= threads <= _MOST_THREADS:
        raise UsageError(f"{threads} threads", remedy=f"Choose 0 to {_MOST_THREADS}")
    usable = usable_cores()
    if threads > usable:
        warn(f"{threads} threads share {usable} usable cores, and wait for each other")
    return threads or usable


def _forked() -> None:
    for engine in list(_engines):
        engine._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
