"""Run a graph once in ONNX Runtime, to check what was exported."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime import RunOptions

from moon.errors import BackendError, ExportError
from moon.runtime.onnxruntime import open_session

__all__ = ["Session", "check_survives", "run"]

Arrays = dict[str, NDArray[Any]]


class Session:
    """An ONNX Runtime session on the CPU.

    Args:
        model: the graph.
        threads: one, so that two runs agree bit for bit; 0 for as many as there are cores.
        optimise: let it change the graph.

    Raises:
        ExportError: ONNX Runtime does not accept the graph.
    """

    def __init__(
        self, model: ModelProto | bytes, *, threads: int = 1, optimise: bool = True
    ) -> None:
        data = model if isinstance(model, bytes) else model.SerializeToString()
        try:
            self._session = open_session(data, threads=threads, optimise=optimise)
        except BackendError as error:
            raise ExportError(f"the graph cannot be loaded: {error.cause}") from error
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Arrays) -> Arrays:
        """All outputs by name.

        Raises:
            BackendError: running failed.
        """
        quiet = RunOptions()
        quiet.log_severity_level = 4  # what fails is told by the exception, not on stderr too
        try:
            values = self._session.run(self._names, feeds, quiet)
        except Exception as error:
            raise BackendError(f"ONNX Runtime could not run the graph: {error}") from error
        return dict(zip(self._names, values, strict=True))

    def run_batches(self, feed: str, items: NDArray[Any], batch_size: int = 64) -> Arrays:
        """All outputs of many items, a batch at a time."""
        parts = [
            self.run({feed: items[i : i + batch_size]}) for i in range(0, len(items), batch_size)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._names}


_LOAD = (
    "import sys; from moon.runtime.onnxruntime import open_session; "
    "open_session(sys.stdin.buffer.read(), threads=1)"
)


def check_survives(model: ModelProto) -> None:
    """ONNX Runtime loads the graph without crashing, tried in a process of its own.

    Its optimiser crashes on some fp16 graphs (transformers, on CPUs), and would take this process
    along, and later everyone's who opens the bundle.

    Raises:
        ExportError: it crashed or refused.
    """
    done = subprocess.run(
        [sys.executable, "-c", _LOAD],
        input=model.SerializeToString(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        how = f"crashes (signal {-done.returncode})" if done.returncode < 0 else "fails"
        raise ExportError(
            f"ONNX Runtime {how} on loading the graph: {lines[-1][:300]}",
            remedy="Export with --precision fp32",
        )


def run(model: ModelProto | bytes, feeds: Arrays) -> Arrays:
    """All outputs of one run.

    Raises:
        ExportError, BackendError: it does not load or run.
    """
    return Session(model).run(feeds)
