"""The parent's side of benchmarks/engine_worker.py."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from moon.errors import BackendError

WORKER = Path(__file__).with_name("engine_worker.py")
PATIENCE = 600.0  # seconds for one answer


class EngineProcess:
    """A resident engine. Use it in a ``with``; it ends with the block.

    Args:
        engine: as engine_worker.py names it.
        python: the interpreter that has it.
        log: a file to keep what it writes to stderr.
        settings: further environment variables.

    Raises:
        BackendError: the interpreter cannot be started.
    """

    def __init__(
        self, engine: str, *, python: str, log: Path, settings: Mapping[str, str] | None = None
    ) -> None:
        self.engine = engine
        self._log = log
        environment = {**os.environ, **(settings or {})}
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
        try:
            with log.open("ab") as stderr:
                self._process = subprocess.Popen(
                    [python, str(WORKER), engine],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    bufsize=0,
                    env=environment,
                )
        except OSError as error:
            raise BackendError(f"{python} cannot be started: {error.strerror}") from error
        self._unread = b""

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Give an order and wait for what comes of it.

        Raises:
            BackendError: the engine fails, ends or does not answer; it has ended then.
        """
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps({"do": do, **order}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(self._line())
        except (BrokenPipeError, EOFError):
            raise BackendError(self._end()) from None
        if "error" in answer:
            self.close()
            raise BackendError(answer["error"])
        return answer

    def _line(self) -> bytes:
        stdout = self._process.stdout
        assert stdout is not None
        until = time.monotonic() + PATIENCE
        while b"\n" not in self._unread:
            ready, _, _ = select.select([stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self.close()
                raise BackendError(f"it has not answered for {PATIENCE:.0f} s")
            read = stdout.read(1 << 16)
            if not read:
                raise EOFError
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _end(self) -> str:
        """How the process ended."""
        code = self._process.wait()
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = f": {said[-1][:200]}" if said else ""
        if code < 0:
            return f"it was ended by {signal.Signals(-code).name}{last}"
        return f"it ended with status {code}{last}"

    def close(self) -> None:
        """End the process; kill it where it does not end by itself."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
