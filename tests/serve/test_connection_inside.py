"""What a connection holds, and for how long, looked at from inside."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from typing import Any

import pytest
from uvicorn.config import Config
from uvicorn.server import Server

from moon.runtime.predictor import Predictor
from moon.serve.bounded import HEADER_BYTES
from moon.serve.worker import Listening
from tests.serve.apps import application
from tests.serve.conftest import until
from tests.serve.inside import Inside, rest

POST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"


async def stub(scope: Any, receive: Any, send: Any) -> None:
    """Refuses at once, or answers 8 KB when all was read."""
    refuses = scope["path"] == "/refuse"
    while not refuses and (await receive()).get("more_body"):
        pass
    body = b"no" if refuses else b"z" * 8000
    headers = [(b"content-length", b"%d" % len(body))]
    await send(
        {"type": "http.response.start", "status": 415 if refuses else 200, "headers": headers}
    )
    await send({"type": "http.response.body", "body": body})


def test_a_little_that_nobody_reads_is_given_up_too() -> None:
    # Less than what makes uvicorn wait for a client to read.
    with Inside(stub, idle_seconds=1, write_seconds=1) as inside, inside.connect(4096) as client:
        connection = inside.only()
        while not connection._raw.get_write_buffer_size():
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(0.005)
        start = time.monotonic()
        until(lambda: not inside.server.server_state.connections)
        assert time.monotonic() - start < 10


def test_who_does_not_read_holds_no_place(predictor: Predictor) -> None:
    app = application(predictor, token="0123456789abcdef")
    app.lifecycle.ready = True
    try:
        with Inside(app, write_seconds=5) as inside, inside.connect(4096) as client:
            connection = inside.only()
            while not connection.flow.write_paused:
                client.sendall(b"GET /ui HTTP/1.1\r\nHost: x\r\n\r\n")
                time.sleep(0.005)
            client.sendall(POST + b"Content-Length: 1\r\n\r\nx")
            time.sleep(0.2)
            assert app.admission.requests == 0
    finally:
        app.models.close()
        app.close()


@pytest.mark.parametrize("parts", [[b"abcde"], [b"", b"abcde"]])
def test_a_refused_client_may_stay(parts: list[bytes]) -> None:
    limits = {"head_seconds": 0.5, "linger_seconds": 0.5, "idle_seconds": 2}
    with Inside(stub, **limits) as inside, inside.connect() as client:
        head = b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"
        client.sendall(head + parts[0])
        for part in parts[1:]:
            time.sleep(0.1)
            client.sendall(part)
        start = time.monotonic()
        assert rest(client).endswith(b"no")
        assert 1.5 < time.monotonic() - start < 10


@pytest.mark.parametrize("way", [b"keep-alive", b"close"])
def test_who_still_sends_hears_the_application(way: bytes) -> None:
    with Inside(stub) as inside:
        for _ in range(5):
            with inside.connect() as client:
                head = b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n"
                client.sendall(head + b"Connection: " + way + b"\r\n\r\n")
                for _ in range(80):
                    client.sendall(b"a" * 50_000)
                client.shutdown(socket.SHUT_WR)
                assert rest(client).startswith(b"HTTP/1.1 415")


def test_a_broken_body_that_was_to_be_asked_for(predictor: Predictor) -> None:
    app = application(predictor)
    app.lifecycle.ready = True
    try:
        with Inside(app) as inside, inside.connect() as client:
            ask = b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\nzz\r\n"
            client.sendall(POST + ask)
            client.shutdown(socket.SHUT_WR)
            assert rest(client).startswith(b"HTTP/1.1 400")
            until(lambda: b'status="400"} 1.0' in app.metrics.exposition())
            assert b'status="500"' not in app.metrics.exposition()
    finally:
        app.models.close()
        app.close()


def test_refused_headers_are_let_go() -> None:
    with Inside(stub) as inside, inside.connect() as client:
        connection = inside.only()
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"ab:cd\r\n" * 30_000)
        until(lambda: connection.closing)
        assert connection.headers == [] and connection._head < 2 * HEADER_BYTES
        client.shutdown(socket.SHUT_WR)
        assert rest(client).startswith(b"HTTP/1.1 431")


def test_a_worker_that_starts_does_not_make_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    # A blocking socket would be so for every process that has it.
    seen = []

    async def startup(self: Server, sockets: list[socket.socket]) -> None:
        seen.extend(fcntl.fcntl(one, fcntl.F_GETFL) & os.O_NONBLOCK for one in sockets)
        for one in sockets[1:]:
            one.close()

    monkeypatch.setattr(Server, "startup", startup)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        start = Listening(Config(stub)).startup([listener])
        with pytest.raises(StopIteration):
            start.send(None)
    assert len(seen) > 1 and all(seen)
