"""A real `moon serve` in its own process, and a bundle for it."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from moon.bundle import Bundle
from moon.runtime.predictor import Predictor
from tests.bundles import images, make_bundle

COMMAND = [sys.executable, "-m", "moon", "serve"]
SIZE = 32
PATIENCE = 30.0


class Server:
    """``moon serve`` with some options, ready when made."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.log = folder / "stderr.txt"
        self.home = folder / "home"
        self.home.mkdir()
        variables = {
            **os.environ,
            "HOME": str(self.home),
            "TMPDIR": str(folder),
            "MOON_SERVE_GRACE_SECONDS": "0",
            **environment,
        }
        port = [] if "--port" in arguments else ["--port", str(free_port())]
        with self.log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments, *port],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=variables,
                text=True,
            )
        assert self.process.stdout is not None
        # The line comes, or the process ends and so does its output.
        self.line = self.process.stdout.readline()
        if not self.line:
            raise AssertionError(self.errors())
        self.url = next(word for word in self.line.split() if word.startswith("http://"))

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE, **options)  # type: ignore[arg-type]

    def workers(self) -> list[int]:
        """Process ids of the workers."""
        path = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        children = [int(text) for text in Path(path).read_text().split()]
        return [child for child in children if b"spawn_main" in _command(child)]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def errors(self) -> str:
        """What it wrote to stderr."""
        return self.log.read_text()

    def kill(self) -> None:
        for process in [self.process.pid, *self.workers()] if self.process.poll() is None else []:
            os.kill(process, signal.SIGKILL)
        self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, or fail."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    # A high reject rate, so that both decisions occur.
    return make_bundle(tmp_path_factory.mktemp("bundle") / "b", size=SIZE, channels=3, reject=0.4)


@pytest.fixture(scope="session")
def predictor(bundle: Bundle) -> Predictor:
    return Predictor.open(bundle)


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """PNG and JPEG files of the model's size and of others."""
    same = [encode(pixels) for pixels in images(24, SIZE, 3, seed=7)]
    larger = [encode(pixels, "JPEG") for pixels in images(8, 224, 3, seed=8)]
    return same + larger


@pytest.fixture
def serve(tmp_path: Path, bundle: Bundle) -> Iterator[Callable[..., Server]]:
    """Starts servers, each with its own options, and leaves none behind."""
    started: list[Server] = []

    def start(*arguments: str, **environment: str) -> Server:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Server(folder, str(bundle.path), *arguments, **environment))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@contextmanager
def running(folder: Path, bundle: Bundle, **environment: str) -> Iterator[Server]:
    """A server for tests that do not stop it, and that must never make it fail."""
    server = Server(folder, str(bundle.path), **environment)
    try:
        yield server
        assert server.stop() == 0
        assert "Traceback" not in server.errors()
        assert "failed" not in server.errors()
    finally:
        server.kill()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server"), bundle) as server:
        yield server
    # Neither settings nor usage reports are left in the user's home.
    assert list(server.home.rglob("*")) == []
