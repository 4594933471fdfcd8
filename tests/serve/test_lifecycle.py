"""Stopping, dying and coming back, in real processes."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.serve.conftest import PATIENCE, Server, until

PNG = {"Content-Type": "image/png"}
TOKEN = "0123456789abcdef"
pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")


class Clients:
    """Threads that each ask again and again until told that the server is leaving."""

    def __init__(self, server: Server, picture: bytes) -> None:
        self.server, self.picture = server, picture
        self.statuses: list[int] = []
        self.failures: list[Exception] = []
        self.leave = threading.Event()
        # Half of them keep their connection, half make a new one for every request.
        kinds = [PNG, {**PNG, "Connection": "close"}] * 2
        self.threads = [threading.Thread(target=self._ask, args=(kind,)) for kind in kinds]
        for thread in self.threads:
            thread.start()

    def _ask(self, headers: dict[str, str]) -> None:
        with self.server.client() as client:
            while not self.leave.is_set():
                try:
                    found = client.post("/predict", content=self.picture, headers=headers)
                    self.statuses.append(found.status_code)
                except Exception as error:
                    self.failures.append(error)

    def join(self) -> None:
        self.leave.set()
        for thread in self.threads:
            thread.join()


def test_sigterm_loses_no_request(serve: Callable[..., Server], pictures: list[bytes]) -> None:
    server = serve(MOON_SERVE_GRACE_SECONDS="3")
    clients = Clients(server, pictures[-1])
    try:
        until(lambda: len(clients.statuses) >= 20)
        server.process.send_signal(signal.SIGTERM)
        # As a load balancer does: asks /readyz, and goes elsewhere once it says no.
        with server.client() as probe:
            until(lambda: probe.get("/readyz").status_code == 503)
            seen = len(clients.statuses)
            until(lambda: len(clients.statuses) >= seen + 20)
            last = probe.get("/livez")
        assert last.status_code == 200
        assert last.headers["connection"] == "close"
    finally:
        clients.join()
    assert clients.failures == []
    assert set(clients.statuses) == {200}
    assert server.wait() == 0
    assert server.errors() == ""
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/livez")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_clients_that_keep_connecting_lose_nothing(
    serve: Callable[..., Server], pictures: list[bytes], workers: str
) -> None:
    # They never look at /readyz. Turned away is fair; accepted and then reset is not.
    server = serve("--workers", workers, MOON_SERVE_GRACE_SECONDS="1")
    port = int(server.url.rsplit(":", 1)[1])
    head = f"Content-Type: image/png\r\nContent-Length: {len(pictures[0])}\r\n\r\n"
    ask = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + head.encode()
    answers: list[bytes] = []
    stop = threading.Event()

    def connect() -> None:
        while not stop.is_set():
            with socket.socket() as connection:
                connection.settimeout(PATIENCE)
                try:
                    connection.connect(("127.0.0.1", port))
                except OSError:
                    time.sleep(0.01)
                    continue
                try:
                    connection.sendall(ask + pictures[0])
                    answers.append(connection.recv(65536)[:12])
                except OSError as error:
                    answers.append(repr(error).encode())

    threads = [threading.Thread(target=connect) for _ in range(16)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(answers) > 50)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(answers) == {b"HTTP/1.1 200"}


def test_requests_in_flight_are_finished(
    serve: Callable[..., Server], pictures: list[bytes]
) -> None:
    server = serve()
    leaving = threading.Event()

    def slowly():  # type: ignore[no-untyped-def]
        yield pictures[0][:100]
        leaving.wait(20)
        time.sleep(1)
        yield pictures[0][100:]

    found: list[int] = []

    def ask() -> None:
        response = httpx.post(f"{server.url}/predict", content=slowly(), headers=PNG, timeout=20)
        found.append(response.status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    leaving.set()
    thread.join()
    assert found == [200]
    assert server.wait() == 0


def test_interrupt_stops_too(serve: Callable[..., Server]) -> None:
    server = serve(MOON_SERVE_GRACE_SECONDS="60")
    for process in [server.process.pid, *server.workers()]:
        # A terminal sends it to all.
        os.kill(process, signal.SIGINT)
    assert server.wait() == 0
    assert "Traceback" not in server.errors()


def test_killed_worker_comes_back(serve: Callable[..., Server], pictures: list[bytes]) -> None:
    server = serve("--workers", "2")
    before = server.workers()
    assert len(before) == 2
    with server.client() as client:
        assert client.post("/predict", content=pictures[0], headers=PNG).status_code == 200
        # It is counted after it was answered.
        counted = 'moon_requests_total{route="/predict",status="200"} 1.0'
        until(lambda: counted in client.get("/metrics").text)
    for worker in before:
        os.kill(worker, signal.SIGKILL)
    until(lambda: len(server.workers()) == 2 and not set(server.workers()) & set(before))
    with server.client() as client:
        assert client.get("/readyz").status_code == 200
        assert client.post("/predict", content=pictures[0], headers=PNG).status_code == 200
        # Counts of the dead stay in the sum.
        until(lambda: counted.replace("1.0", "2.0") in client.get("/metrics").text)
    assert server.errors().count("takes its place") == 2
    assert server.stop() == 0


def test_workers_do_not_outlive_their_supervisor(serve: Callable[..., Server]) -> None:
    server = serve()
    (worker,) = server.workers()
    server.process.kill()
    server.wait()
    until(lambda: not Path(f"/proc/{worker}").exists())


def test_token_of_a_file(
    serve: Callable[..., Server], pictures: list[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    server = serve("--token-file", str(path), "--host", "0.0.0.0")
    with server.client() as client:
        ask = client.build_request("POST", "/predict", content=pictures[0], headers=PNG)
        refused = client.send(ask)
        assert refused.status_code == 401
        assert refused.json()["status"] == 401
        ask.headers["Authorization"] = f"Bearer {TOKEN}"
        assert client.send(ask).status_code == 200
        assert client.get("/readyz").status_code == 200
    for process in [server.process.pid, *server.workers()]:
        for file in ("cmdline", "environ"):
            assert TOKEN.encode() not in Path(f"/proc/{process}/{file}").read_bytes()
    assert server.stop() == 0
    assert TOKEN not in server.errors()
