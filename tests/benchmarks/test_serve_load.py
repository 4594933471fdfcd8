"""The load generator of benchmarks/serve.py, on a server whose times are known."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.serve_load import closed, open_loop, request

BODY = b"x" * 3000


@contextmanager
def server(status: bytes, pause: float, last: bool = False) -> Iterator[int]:
    """Answers each request after a pause, a thread a connection; counts nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def talk(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(10)
            while not ended.is_set():
                data = b""
                while b"\r\n\r\n" not in data or not data.endswith(BODY):
                    try:
                        piece = connection.recv(65536)
                    except OSError:
                        return
                    if not piece:
                        return
                    data += piece
                time.sleep(pause)
                close = b"Connection: close\r\n" if last else b""
                head = b"HTTP/1.1 " + status + b" X\r\nContent-Length: 4\r\n" + close + b"\r\n"
                connection.sendall(head)
                connection.sendall(b"body")  # an answer in two pieces
                if last:
                    return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.mark.parametrize("last", [False, True])
def test_clients_ask_again_when_they_were_answered(last: bool) -> None:
    with server(b"200", 0.02, last) as port:
        found = closed(port, request(BODY, "image/png"), 4, seconds=0.5)
    assert not found.failed and not found.refused
    assert 20 < len(found.answered) <= 4 * 26
    assert found.percentile(50) >= 20 and found.rate == len(found.answered) / found.seconds


def test_requests_come_at_their_times_however_slow_the_server_is() -> None:
    with server(b"200", 0.3) as port:
        found = open_loop(port, request(BODY, "image/png"), 100, seconds=0.5, seed=3)
    # Some 50 in half a second, though each takes 0.3 s: many are under way at once.
    assert 30 < len(found.answered) < 75 and not found.failed
    assert found.percentile(50) >= 300


def test_refusals_are_counted_apart() -> None:
    with server(b"503", 0.0) as port:
        found = open_loop(port, request(BODY, "image/png"), 50, seconds=0.4)
    assert found.refused and not found.answered and not found.failed
    with server(b"422", 0.0) as port:
        found = closed(port, request(BODY, "image/png"), 1, seconds=0.1)
    assert list(found.failed) == ["422"]


def test_nobody_there_is_a_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    found = open_loop(port, request(BODY, "image/png"), 50, seconds=0.2)
    assert list(found.failed) == ["ConnectionRefusedError"]
