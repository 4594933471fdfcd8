"""TensorRT's execution context, with errors in place of a false that nobody looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moon.errors import BackendError
from moon.runtime.trt.log import Log

__all__ = ["Execution"]


class Execution:
    """One ``IExecutionContext``.

    Args:
        context: the context; nobody else may hold it.
        log: what the package says.
    """

    def __init__(self, context: Any, log: Log) -> None:
        self._context, self._log = context, log

    def shape(self, name: str, dims: tuple[int, ...]) -> None:
        """Set the shape of an input.

        Raises:
            BackendError: the engine does not take it.
        """
        self._do(f"the shape {list(dims)}", lambda: self._context.set_input_shape(name, dims))

    def address(self, name: str, address: int) -> None:
        """Say where an input or output is in the GPU's memory.

        Raises:
            BackendError: there is no such tensor.
        """
        self._do(f"memory for {name}", lambda: self._context.set_tensor_address(name, address))

    def enqueue(self, stream: int) -> None:
        """Enqueue the computation.

        Raises:
            BackendError: it could not be.
        """
        self._do("to run the engine", lambda: self._context.execute_async_v3(stream))

    def close(self) -> None:
        """Let go of the context, and with it of its memory on the GPU."""
        self._context = None

    def _do(self, what: str, action: Callable[[], Any]) -> None:
        with self._log.collect() as messages:
            try:
                done = action()
            except Exception as error:  # pybind raises RuntimeError and TypeError alike
                raise _refused(what, Log.errors(messages) or [str(error)]) from error
        if not done:
            raise _refused(what, Log.errors(messages))


def _refused(what: str, reasons: list[str]) -> BackendError:
    return BackendError(f"TensorRT refused {what}: {reasons[0] if reasons else 'no reason given'}")
