"""A graph, or a part of one, that ONNX Runtime runs."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from moon.runtime.onnxruntime import open_session, run_session
from moon.runtime.sparse.input import Input, dtype_of

__all__ = ["Session"]


class Session:
    """A part, or a whole model, that ONNX Runtime runs.

    Args:
        model: an ONNX file, or its path where values may lie in others beside it.
        threads: for one inference; 0 for all cores.
        spin: let idle threads spin between runs.

    Attributes:
        inputs: what must be fed.
        optional: what may be fed.
        outputs: names of what it makes, in the file's order.

    Raises:
        BackendError: ONNX Runtime refuses the model.
    """

    def __init__(self, model: bytes | str, *, threads: int, spin: bool) -> None:
        self._model, self._threads, self._spin = model, threads, spin
        self._opened: Any = None
        self.reset()
        session = self._session()
        self.inputs = tuple(_input(one) for one in session.get_inputs())
        self._required = [one.name for one in self.inputs]
        overridable = session.get_overridable_initializers()
        self.optional = tuple(_input(one, optional=True) for one in overridable)
        self.outputs = [one.name for one in session.get_outputs()]

    def reset(self) -> None:
        """In a child that was forked, whose parent's threads are not there: begin anew."""
        if self._opened is not None:
            # Never freed: to free it would be to wait for threads that are not in this process.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._opened))
        self._opened = None
        self._lock = threading.Lock()

    def run(self, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Its results, in the file's order."""
        feeds = {name: values[name] for name in self._required}
        feeds |= {one.name: values[one.name] for one in self.optional if one.name in values}
        return run_session(self._opened or self._session(), self.outputs, feeds)

    def _session(self) -> Any:
        with self._lock:
            if self._opened is None:
                self._opened = open_session(self._model, threads=self._threads, spin=self._spin)
            return self._opened


def _input(node: Any, *, optional: bool = False) -> Input:
    # An empty shape is that of a scalar, or of a tensor of any rank.
    shape = tuple(size if isinstance(size, int) else None for size in node.shape) or None
    return Input(node.name, dtype_of(node.type), shape, optional)
