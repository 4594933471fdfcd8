"""Clients that are too slow, or too many: each is cut off, and nobody else waits for them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from moon.bundle import Bundle
from tests.serve.conftest import Server, running, until

PNG = {"Content-Type": "image/png"}
POST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Iterator[Server]:
    with running(
        tmp_path_factory.mktemp("impatient"),
        bundle,
        MOON_SERVE_HEAD_SECONDS="0.7",
        MOON_SERVE_BODY_SECONDS="0.7",
        MOON_SERVE_LINGER_SECONDS="0.7",
        MOON_SERVE_IDLE_SECONDS="1",
        MOON_SERVE_WRITE_SECONDS="0.7",
        MOON_SERVE_CONNECTIONS="40",
        MOON_SERVE_ITEMS="3",
    ) as server:
        yield server
    assert server.errors() == ""


def connect(server: Server) -> socket.socket:
    parts = urlsplit(server.url)
    assert parts.hostname and parts.port
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


def rest(connection: socket.socket) -> bytes:
    """All that still comes until the server closes."""
    found = b""
    try:
        while chunk := connection.recv(65536):
            found += chunk
    except ConnectionError:
        pass
    return found


def trickle(connection: socket.socket, data: bytes) -> float:
    """Send a byte at a time until cut off; how long that took."""
    start = time.monotonic()
    connection.settimeout(0.05)
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
            if not connection.recv(65536):
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    return time.monotonic() - start


def test_slow_headers(impatient: Server) -> None:
    with connect(impatient) as connection:
        assert 0.5 < trickle(connection, POST + b"X: " + b"a" * 500) < 10
    with connect(impatient) as connection:
        connection.sendall(POST)
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b"did not arrive in time" in answer


def test_no_headers_at_all(impatient: Server) -> None:
    with connect(impatient) as connection:
        assert rest(connection) == b""


def test_slow_headers_of_a_second_request(impatient: Server) -> None:
    with connect(impatient) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: b"ok\n" in connection.recv(65536))
        assert 0.5 < trickle(connection, POST + b"X: " + b"a" * 500) < 10


def test_idle_connections_are_closed(impatient: Server) -> None:
    with connect(impatient) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert rest(connection).endswith(b"ok\n")


def test_slow_body(impatient: Server) -> None:
    with connect(impatient) as connection:
        connection.sendall(POST + b"Content-Length: 1000\r\n\r\nfew")
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"The body did not arrive" in answer
    with connect(impatient) as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        assert 0.5 < trickle(connection, b"1\r\nx\r\n" * 200) < 10


def test_body_after_a_refusal(impatient: Server) -> None:
    # Answered with 415 at once; the rest of the body is read for a while, not for ever.
    with connect(impatient) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n")
        assert 0.5 < trickle_on(connection, 2000) < 10


def trickle_on(connection: socket.socket, count: int) -> float:
    """Send byte after byte whatever comes back, until cut off."""
    start = time.monotonic()
    connection.settimeout(0.01)
    for _ in range(count):
        try:
            connection.sendall(b"x")
            if not connection.recv(65536):
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    return time.monotonic() - start


def test_client_that_does_not_read(impatient: Server) -> None:
    # Asks for 1.4 MB again and again, and reads nothing.
    ask = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(impatient) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(0.2)
        start = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() < start + 15:
                try:
                    connection.sendall(ask)
                except TimeoutError:
                    continue
                time.sleep(0.02)


def test_too_many_connections(impatient: Server, pictures: list[bytes]) -> None:
    idle = [connect(impatient) for _ in range(60)]
    try:
        turned_away = [one for one in idle if _refused(one)]
        assert len(turned_away) >= 20
    finally:
        for one in idle:
            one.close()

    def works() -> bool:
        try:
            found = httpx.post(f"{impatient.url}/predict", content=pictures[0], headers=PNG)
        except httpx.HTTPError:
            return False
        return found.status_code == 200

    until(works)


def _refused(connection: socket.socket) -> bool:
    connection.settimeout(0.3)
    try:
        answer = rest(connection)
    except TimeoutError:
        return False
    return answer.startswith(b"HTTP/1.1 503") and b"Retry-After: 1\r\n" in answer


def test_health_during_an_attack(impatient: Server) -> None:
    slow = [connect(impatient) for _ in range(30)]
    try:
        for one in slow:
            one.sendall(POST)
        start = time.monotonic()
        assert httpx.get(f"{impatient.url}/livez", timeout=5).status_code == 200
        assert time.monotonic() - start < 5
    finally:
        for one in slow:
            one.close()


def test_limits_are_told(impatient: Server) -> None:
    with impatient.client() as client:
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
        assert schemas["Instances"]["properties"]["instances"]["maxItems"] == 3
        four = {"instances": [{"b64": ""}] * 4}
        refused = client.post("/predict", json=four)
        assert refused.status_code == 422
        assert "at most 3 images" in refused.json()["detail"]
