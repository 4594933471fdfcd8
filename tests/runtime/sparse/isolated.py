"""Models run in a process of their own, so that a native crash fails one test and not all of them.

with Isolated() as process:
    process.engine(data, x, threads=2)   ->  outputs, or MoonError
    process.reference(data, x)           ->  outputs of ONNX Runtime, or Refused
"""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import MoonError
from moon.runtime.sparse.model import read_model

from .graphs import opened

Array = NDArray[Any]
ROOT = Path(__file__).parents[3]
# Of an input made up for a model that says what it takes.
_MOST_NUMBERS = 1 << 20


class DiedError(AssertionError):
    """The process crashed, or was not done in time."""


class RefusedError(Exception):
    """ONNX Runtime does not take the model or fails at it."""


class EscapedError(AssertionError):
    """The engine raised what is no MoonError."""


class Isolated:
    """A process for running models; a new one after each that ended.

    Args:
        memory: bytes of address space it may have; 0 for no limit.
        seconds: a model may take.
    """

    def __init__(self, memory: int = 0, seconds: float = 60) -> None:
        self._memory, self._seconds = memory, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def engine(self, data: bytes, x: Array | None = None, **options: Any) -> list[Array]:
        """Outputs of the engine; of a random input where none is given.

        Raises:
            MoonError: the engine's own.
            DiedError, EscapedError: what must not be.
        """
        kind, value = self._ask(("engine", data, x, options))
        if kind == "moon":
            raise value
        if kind == "failed":
            raise EscapedError(value)
        return value  # type: ignore[no-any-return]

    def reference(self, data: bytes, x: Array | None = None) -> list[Array]:
        """Outputs of ONNX Runtime, nothing of the graph rewritten.

        Raises:
            RefusedError: it takes the model for broken.
            DiedError: it crashed.
        """
        kind, value = self._ask(("reference", data, x, {}))
        if kind != "ok":
            raise RefusedError(value)
        return value  # type: ignore[no-any-return]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for file in (self._process.stdin, self._process.stdout, self._errors):
                if file is not None:
                    file.close()
        self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-X", "faulthandler", "-m", __name__, str(self._memory)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            cwd=ROOT, env=environment,
        )  # fmt: skip

    def _ask(self, request: object) -> tuple[str, Any]:
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None and self._process.stdout is not None
        end = time.monotonic() + self._seconds
        try:
            _send(self._process.stdin.fileno(), request)
            answer: tuple[str, Any] = _receive(self._process.stdout.fileno(), end)
        except (EOFError, BrokenPipeError, TimeoutError) as error:
            late = isinstance(error, TimeoutError)
            code = "no answer" if late else _ending(self._process.wait())
            assert self._errors is not None
            self._errors.seek(0)
            said = self._errors.read()[-3000:].decode(errors="replace")
            self.close()
            raise DiedError(f"{code}: {said}") from error
        return answer


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit {code}"


def _send(file: int, value: object) -> None:
    data = pickle.dumps(value)
    data = struct.pack("<Q", len(data)) + data
    while data:
        data = data[os.write(file, data) :]


def _receive(file: int, end: float | None = None) -> Any:
    def read(count: int) -> bytes:
        parts = []
        while count:
            if end is not None:
                ready, _, _ = select.select([file], [], [], max(0, end - time.monotonic()))
                if not ready:
                    raise TimeoutError
            parts.append(os.read(file, min(count, 1 << 20)))
            if not parts[-1]:
                raise EOFError
            count -= len(parts[-1])
        return b"".join(parts)

    return pickle.loads(read(struct.unpack("<Q", read(8))[0]))


# In the process.


def _input(data: bytes) -> Array | None:
    """A random input of the shape that a model says; None where it is too large."""
    (value,) = read_model(data).inputs
    shape = [2 if not isinstance(size, int) else size for size in value.shape or ()]
    if value.dtype != np.float32 or int(np.prod(shape, dtype=object)) > _MOST_NUMBERS:
        return None
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _engine(data: bytes, x: Array | None, options: dict[str, Any]) -> list[Array]:
    engine = opened(data, **options)
    try:
        x = _input(data) if x is None else x
        if x is None:
            return []
        found = engine.run(x)
        again = engine.run(x)
    finally:
        engine.close()
    one, other = (y if isinstance(y, list) else [y] for y in (found, again))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))
    return one


def _reference(data: bytes, x: Array | None, options: dict[str, Any]) -> list[Array]:
    import onnxruntime as ort

    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads, chosen.log_severity_level = 1, 4
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(data, chosen, providers=["CPUExecutionProvider"])
    x = _input(data) if x is None else x
    if x is None:
        return []
    (name,) = (value.name for value in session.get_inputs())
    return list(session.run(None, {name: x}))


def _answer(request: tuple[str, bytes, Array | None, dict[str, Any]]) -> tuple[str, Any]:
    kind, *arguments = request
    work: Callable[..., list[Array]] = _engine if kind == "engine" else _reference
    try:
        return "ok", work(*arguments)
    except MoonError as error:
        return "moon", error
    except BaseException:
        return "failed", traceback.format_exc()


def _main() -> None:
    if memory := int(sys.argv[1]):
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.dup(1)
    os.dup2(2, 1)  # what native code prints must not get among the answers
    while True:
        try:
            request = _receive(0)
        except EOFError:
            return
        _send(answers, _answer(request))


if __name__ == "__main__":
    _main()
