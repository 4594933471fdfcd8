"""The sparse CPU engine: any ONNX image classifier, faster the sparser it is."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError, UsageError
from moon.runtime.onnxruntime import open_session
from moon.runtime.sparse.cache import Cache
from moon.runtime.sparse.cut import cut
from moon.runtime.sparse.fold import fold
from moon.runtime.sparse.jit import Jit, fingerprint
from moon.runtime.sparse.kernels import SOURCES
from moon.runtime.sparse.kernels_driver import DRIVER, OPERATION
from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.lower import Lowered, lower
from moon.runtime.sparse.memory import Guard, Space
from moon.runtime.sparse.model import Model, Value, read_model
from moon.runtime.sparse.plan import Costs
from moon.runtime.sparse.program import Program
from moon.runtime.sparse.team import Team

__all__ = ["SparseEngine"]

Array = NDArray[Any]

# Larger batches are run in parts, of so many images and so many bytes in the largest tensor.
_MOST_IMAGES, _MOST_BYTES = 64, 1 << 30
# Programs kept, each for a number of images.
_MOST_READY = 4
_MOST_THREADS = 1024

_engines: weakref.WeakSet[SparseEngine] = weakref.WeakSet()


@dataclass(frozen=True)
class _Ready:
    """A program for one number of images."""

    program: Program
    operations: NDArray[np.int64]


class SparseEngine:
    """An ONNX classifier on the CPU, its zeros left out.

    Safe for several threads, one inference at a time; a process that was forked can go on with it.

    Args:
        model: the file, or its bytes.
        threads: that run together; 0 for as many as this process may use.
        isa: instruction set, "native" for the best there is.
        guard: for finding errors, see :class:`moon.runtime.sparse.memory.Space`.

    Attributes:
        threads: that run together.

    Raises:
        BackendError: the model cannot be read, or has not one float32 input [N, C, H, W].
        UsageError: no such number of threads, or instruction set.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        *,
        threads: int = 1,
        isa: str = "native",
        guard: Guard | None = None,
    ) -> None:
        self.threads = _threads(threads)
        data = model if isinstance(model, bytes) else Path(model).read_bytes()
        self._model: Model = fold(read_model(data))
        self._input, self._shape = _image_input(self._model)
        self._space = Space(guard)
        self._jit = Jit(isa, Cache(), fingerprint=fingerprint(*SOURCES))
        self._costs = Costs.of(self._jit.isa, self._jit.cpu)
        self._lowered = self._lower(self._fixed or 1)
        self._results = self._wanted()
        self._tail, self._tail_outputs = self._cut()
        self._most = self._most_images()
        drivers = self._jit.addresses(DRIVER)
        self._team = Team(self.threads, drivers["lead"], drivers["work"])
        self._ready: OrderedDict[int, _Ready] = OrderedDict()
        self._reset()
        _engines.add(self)

    def _reset(self) -> None:
        """What a child that was forked cannot go on with: locks, and ONNX Runtime's threads."""
        self._lock = threading.Lock()
        self._session = self._open()

    def _open(self) -> Any:
        return None if self._tail is None else open_session(self._tail, threads=self.threads)

    @property
    def handed_over(self) -> str:
        """The first node that ONNX Runtime runs, and why; "" when there is none."""
        return self._lowered.first

    @property
    def _fixed(self) -> int | None:
        """The number of images, where the graph is for one only."""
        return self._shape[0]

    # Preparation.

    def _lower(self, images: int) -> Lowered:
        _, channels, height, width = self._shape
        given = Planes(channels, images, height, width)
        return lower(self._model, self._input, given, fixed=self._fixed is not None)

    def _wanted(self) -> list[str]:
        """What steps make and something else reads."""
        made = {step.target for step in self._lowered.steps}
        outside = {name for node in self._lowered.rest for name in (*node.inputs, *node.captured)}
        wanted = {value.name for value in self._model.outputs}
        return sorted(made & (outside | wanted))

    def _cut(self) -> tuple[bytes | None, list[str]]:
        """What ONNX Runtime does, as a file, and the outputs it makes."""
        rest = self._lowered.rest
        made = {name for node in rest for name in node.outputs}
        outputs = [value.name for value in self._model.outputs if value.name in made]
        if not outputs:
            return None, []
        read = {name for node in rest for name in (*node.inputs, *node.captured)}
        given = [
            Value(name, np.dtype(np.float32), None)
            for name in (*self._results, self._input)
            if name in read
        ]
        optional = [
            Value(name, self._model.constants[name].dtype, self._model.constants[name].shape)
            for name in sorted(self._model.optional)
        ]
        return cut(self._model, [*given, *optional], outputs, rest), outputs

    def _most_images(self) -> int:
        if self._fixed is not None:
            return self._fixed
        largest = max(tensor.nbytes for tensor in self._lowered.tensors.values())
        return max(1, min(_MOST_IMAGES, _MOST_BYTES // largest))

    def _prepared(self, images: int) -> _Ready:
        if images not in self._ready:
            lowered = self._lowered if images == (self._fixed or 1) else self._lower(images)
            program = Program(
                lowered.steps,
                lowered.tensors,
                self._input,
                self._results,
                self._costs,
                self.threads,
                space=self._space,
            )
            found = self._jit.addresses({one.kernel: one.build for one in program.operations})
            rows = [
                {"kernel": found[o.kernel], "record": o.record.address, "meet": int(o.meet)}
                for o in program.operations
            ]
            self._ready[images] = _Ready(program, OPERATION.table(rows))
        self._ready.move_to_end(images)
        while len(self._ready) > _MOST_READY:
            self._ready.popitem(last=False)
        return self._ready[images]

    # Running.

    def run(self, x: Array | Mapping[str, Array]) -> Array | list[Array]:
        """All outputs for a batch.

        Args:
            x: the input, or inputs by name.

        Returns:
            One output as an array, several as a list in the graph's order.

        Raises:
            UsageError: the input has another type or shape, or holds NaN or infinity; or there
                is no such input.
            BackendError: ONNX Runtime fails at its part, or the engine is closed.
        """
        feeds = dict(x) if isinstance(x, Mapping) else {self._input: x}
        if self._input not in feeds or set(feeds) - {self._input} - self._model.optional:
            names = ", ".join([self._input, *sorted(self._model.optional)])
            raise UsageError(f"the inputs are {names}, not {', '.join(feeds) or 'none'}")
        images = np.asarray(feeds.pop(self._input))
        self._check(images)
        with self._lock:
            parts = [
                self._run(images[start : start + self._most])
                for start in range(0, len(images), self._most)
            ]
            found = {name: self._joined(name, parts) for name in self._results}
            found[self._input] = images
            found |= self._rest(found, feeds)
        known = {**self._model.constants, **found}
        outputs = [np.array(known[value.name]) for value in self._model.outputs]
        return outputs[0] if len(outputs) == 1 else outputs

    def close(self) -> None:
        """End the threads. There is no run after that."""
        with self._lock:
            self._team.close()

    def _check(self, images: Array) -> None:
        if images.dtype != np.float32 or images.ndim != 4 or images.shape[1:] != self._shape[1:]:
            raise UsageError(
                f"the input must be float32 {['N', *self._shape[1:]]},"
                f" not {images.dtype} {list(images.shape)}"
            )
        if self._fixed is not None and len(images) != self._fixed:
            raise UsageError(f"the model is for {self._fixed} images at a time, not {len(images)}")
        if not np.isfinite(images).all():
            raise UsageError("the input holds NaN or infinite values")

    def _run(self, images: Array) -> dict[str, Array]:
        ready = self._prepared(len(images))
        ready.program.feed(images)
        self._team.run(ready.operations)
        return {name: ready.program.result(name).copy() for name in self._results}

    def _joined(self, name: str, parts: list[dict[str, Array]]) -> Array:
        if parts:
            return np.concatenate([part[name] for part in parts])
        tensor = self._lowered.tensors[name]
        if isinstance(tensor, Planes):
            return np.zeros((0, tensor.channels, tensor.height, tensor.width), np.float32)
        return np.zeros((0, tensor.features), np.float32)

    def _rest(self, made: Mapping[str, Array], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """What ONNX Runtime makes of it."""
        if self._session is None:
            return {}
        wanted = {one.name for one in self._session.get_inputs()}
        given = {k: np.ascontiguousarray(v) for k, v in made.items() if k in wanted}
        try:
            values = self._session.run(self._tail_outputs, {**given, **feeds})
        except Exception as error:  # its exceptions share no base class but Exception
            raise BackendError(f"ONNX Runtime failed: {error}") from error
        return dict(zip(self._tail_outputs, values, strict=True))


def _threads(threads: int) -> int:
    if not 0 <= threads <= _MOST_THREADS:
        raise UsageError(f"{threads} threads", remedy=f"Choose 0 to {_MOST_THREADS}")
    if threads:
        return threads
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _image_input(model: Model) -> tuple[str, tuple[int | None, int, int, int]]:
    """Name and shape of the one input; the number of images is None where it varies."""
    if len(model.inputs) != 1 or not model.outputs:
        raise BackendError(f"the model has {len(model.inputs)} inputs, not one")
    (value,) = model.inputs
    shape: tuple[Any, ...] = value.shape or ()
    fixed = len(shape) == 4 and all(isinstance(d, int) and d > 0 for d in shape[1:])
    if value.dtype != np.float32 or not fixed or 4 * int(np.prod(shape[1:])) > _MOST_BYTES:
        raise BackendError(
            f"the input {value.name} is not float32 [N, C, H, W] of a fixed size",
            remedy="Use --backend onnxruntime",
        )
    first = shape[0] if isinstance(shape[0], int) else None
    if first is not None and not 1 <= first <= 1024:
        raise BackendError(f"the model is for {first} images at a time")
    return value.name, (first, shape[1], shape[2], shape[3])


def _forked() -> None:
    for engine in list(_engines):
        # Never freed: to free it would be to wait for threads that are not in this process.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine._session))
        engine._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
