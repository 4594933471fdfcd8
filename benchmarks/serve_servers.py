"""The servers that are compared: each in a process of its own, pinned, doing the same job."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

__all__ = ["COMMANDS", "Server", "missing", "serving"]

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "moon": ["moon", "serve", "{bundle}"],
    "bentoml": ["bentoml", "serve", "benchmarks.stock_service:Stock", "--host", "127.0.0.1"],
    "fastapi": ["uvicorn", "benchmarks.fastapi_service:app", "--log-level", "warning"],
}


@dataclass(frozen=True)
class Server:
    """One that answers.

    Attributes:
        name: a key of `COMMANDS`.
        port: of loopback.
        process: the one that was started; others may be its children.
    """

    name: str
    port: int
    process: subprocess.Popen[bytes]

    @property
    def resident(self) -> int:
        """Bytes of memory of it and its children, what they share counted for each."""
        return sum(_resident(pid) for pid in _family(self.process.pid))


def missing(name: str) -> str | None:
    """The package that a server needs and that is not installed."""
    return name if name != "moon" and find_spec(name) is None else None


@contextmanager
def serving(name: str, bundle: Path, folder: Path, pinned: set[int]) -> Iterator[Server]:
    """A server from its first answer on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    variables = {
        **os.environ,
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(folder / "bentoml"),
        "MOON_SERVE_GRACE_SECONDS": "0",
        "ORT_DISABLE_TELEMETRY": "1",
        "STOCK_BUNDLE": str(bundle),
    }
    words = [word.format(bundle=bundle) for word in COMMANDS[name]]
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *words, "--port", str(port)],
            env=variables, stdout=log, stderr=log, cwd=ROOT,
            preexec_fn=lambda: os.sched_setaffinity(0, pinned),
        )  # fmt: skip
    try:
        _wait(port, process)
        yield Server(name, port, process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} ended with {process.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as probe:
                probe.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                if b" 200 " in probe.recv(100):
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"{process.args!r} did not get ready")


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in _family(int(child)))]


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
