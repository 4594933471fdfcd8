"""Two services behind nginx, restarted one by one under load: no request fails."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import cycle
from pathlib import Path

import httpx
import pytest

from moon.bundle import Bundle
from moon.serve.packaging import package
from tests.serve.conftest import Server, free_port, until
from tests.serve.crowd import crowd

pytestmark = pytest.mark.slow

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CLIENTS, ENOUGH = 4, 80


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_no_request_fails(tmp_path: Path, bundle: Bundle, pictures: list[bytes]) -> None:
    package(bundle.path, tmp_path / "out")
    ports = [free_port() for _ in range(3)]
    with (
        serving(tmp_path, bundle, ports[1]) as first,
        serving(tmp_path, bundle, ports[2]) as other,
        in_front(tmp_path, ports) as url,
        load(url, pictures) as answers,
    ):
        until(lambda: answers.total() > ENOUGH)
        for server in (first, other):
            assert server.restart() == 0
            more = answers.total() + ENOUGH
            until(lambda more=more: answers.total() > more)
    assert set(answers) == {200}, answers


class Restarted:
    """A service on one port that can be started again."""

    def __init__(self, folder: Path, bundle: Bundle, port: int) -> None:
        self._folder, self._bundle, self._port, self._number = folder, bundle, port, 0
        self.server = self._start()

    def _start(self) -> Server:
        self._number += 1
        folder = self._folder / f"{self._port}-{self._number}"
        folder.mkdir()
        words = [str(self._bundle.path), "--port", str(self._port)]
        return Server(folder, *words, MOON_SERVE_GRACE_SECONDS="2")

    def restart(self) -> int:
        """As the comment in nginx.conf says."""
        status = self.server.stop()
        self.server.kill()  # nothing is left but its pipe
        self.server = self._start()
        until(lambda: httpx.get(f"{self.server.url}/readyz").status_code == 200)
        return status


@contextmanager
def serving(folder: Path, bundle: Bundle, port: int) -> Iterator[Restarted]:
    one = Restarted(folder, bundle, port)
    try:
        yield one
    finally:
        one.server.kill()


@contextmanager
def in_front(folder: Path, ports: list[int]) -> Iterator[str]:
    """nginx by the packaged configuration, on other ports."""
    text = (folder / "out" / "nginx.conf").read_text()
    for written, port in zip(("3000", "3001", "3002"), ports, strict=True):
        text = text.replace(f"127.0.0.1:{written}", f"127.0.0.1:{port}")
    (folder / "nginx.conf").write_text(text)
    command = [str(NGINX), "-c", str(folder / "nginx.conf"), "-p", str(folder)]
    # As root its workers would be nobody, who may not enter a test's folder.
    user = " user root;" if os.geteuid() == 0 else ""
    process = subprocess.Popen([*command, "-g", f"daemon off;{user}"])
    try:
        url = f"http://127.0.0.1:{ports[0]}"
        until(lambda: reachable(url))
        yield url
    finally:
        process.terminate()
        process.wait(10)


def reachable(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def load(url: str, pictures: list[bytes]) -> AbstractContextManager[Counter[Hashable]]:
    """Clients with each picture in turn; how often which status was answered, or what failed."""
    images = cycle(pictures)

    def ask(client: httpx.Client) -> int:
        headers = {"content-type": "image/*"}
        return client.post("/predict", content=next(images), headers=headers).status_code

    return crowd(lambda: httpx.Client(base_url=url, timeout=20), ask, clients=CLIENTS, asks=40)
