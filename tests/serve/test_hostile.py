"""What a real server answers to requests that are wrong, or worse."""

from __future__ import annotations

import contextlib
import pickle
import socket
import struct
import zlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.conftest import Server

PNG = {"Content-Type": "image/png"}
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=b"}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def refused(response: httpx.Response, status: int, cause: str = "") -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert set(problem) >= {"type", "title", "status", "detail", "request_id"}
    assert problem["status"] == status
    assert problem["request_id"] == response.headers["x-request-id"]
    assert cause in problem["detail"]
    return problem


def bomb(width: int, height: int) -> bytes:
    """A small PNG of a huge black image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pack = zlib.compressobj(9)
    row = bytes(1 + width // 8)
    data = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_truncated_jpeg(client: httpx.Client, pictures: list[bytes]) -> None:
    half = pictures[-1][: len(pictures[-1]) // 2]
    response = client.post("/predict", content=half, headers={"Content-Type": "image/jpeg"})
    refused(response, 400, "truncated")


@pytest.mark.parametrize("body", [b"", b"text", b"<svg xmlns='x'/>", b"\x89PNG\r\n\x1a\n", b"BM"])
def test_not_an_image(client: httpx.Client, body: bytes) -> None:
    refused(client.post("/predict", content=body, headers=PNG), 400)


def test_bomb_is_not_decoded(client: httpx.Client) -> None:
    body = bomb(10_000, 9_000)
    assert len(body) < 20_000
    refused(client.post("/predict", content=body, headers=PNG), 400, "more than the limit")


def test_large_body(client: httpx.Client) -> None:
    body = bytes(11 * 2**20)
    refused(client.post("/predict", content=body, headers=PNG), 413, "larger than 10 MiB")
    # The same without a length told beforehand.
    stream = (body[i : i + 2**16] for i in range(0, len(body), 2**16))
    refused(client.post("/predict", content=stream, headers=PNG), 413)
    assert client.get("/livez").status_code == 200


@pytest.mark.parametrize(
    "declared",
    [
        "application/vnd.bentoml+pickle",
        "APPLICATION/VND.BENTOML+PICKLE",
        "Application/Vnd.BentoML+Pickle; charset=utf-8",
        "application/x-pickle",
        "image/pickle",
        "application/json;pickle",
    ],
)
def test_pickles_are_never_read(client: httpx.Client, declared: str) -> None:
    body = pickle.dumps(Bomb())
    headers = {"Content-Type": declared, "Payload-Container": "NdarrayContainer"}
    refused(client.post("/predict", content=body, headers=headers), 415)
    # Under a type that is read, the bytes are just not an image.
    refused(client.post("/predict", content=body, headers=PNG), 400)
    assert client.get("/livez").status_code == 200


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[int]]:
        import os

        return os._exit, (1,)


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, b"x", 415),
        ({"Content-Type": "text/plain"}, b"x", 415),
        ({"Content-Type": "application/octet-stream"}, b"x", 415),
        ({**PNG, "Content-Encoding": "gzip"}, b"x", 415),
        (JSON, b"{", 400),
        (JSON, b'{"instances": [{"b64": NaN}]}', 400),
        (JSON, b'{"instances": [{"b64": "!!"}]}', 400),
        (JSON, b"\xff", 400),
        (JSON, b"[" * 200_000, 400),
        (JSON, b"null", 422),
        (JSON, b'{"instances": [{"url": "http://127.0.0.1/"}]}', 422),
        (JSON, b'{"instances": ["http://127.0.0.1/"]}', 422),
        (JSON, b'{"instances": [' + b",".join([b'{"b64": ""}'] * 65) + b"]}", 422),
        ({"Content-Type": "multipart/form-data"}, b"x", 400),
        (FORM, b"", 400),
        (FORM, b"--other\r\n\r\nx\r\n--other--\r\n", 400),
        (FORM, b'--b\r\nContent-Disposition: form-data; name="url"\r\n\r\nhttp://x\r\n--b--', 422),
        (FORM, b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n--b--\r\n', 400),
    ],
)
def test_wrong_requests(
    client: httpx.Client, headers: dict[str, str], body: bytes, status: int
) -> None:
    refused(client.post("/predict", content=body, headers=headers), status)


def test_wrong_routes_and_methods(client: httpx.Client) -> None:
    refused(client.get("/nowhere"), 404)
    refused(client.get("/../../etc/passwd"), 404)
    refused(client.get("/predict"), 405)
    assert client.get("/predict").headers["allow"] == "POST"
    refused(client.post("/readyz"), 405)
    refused(client.request("TRACE", "/"), 405)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_images_never_fail_the_server(
    client: httpx.Client, pictures: list[bytes], data: st.DataObject
) -> None:
    whole = data.draw(st.sampled_from([pictures[0], pictures[-1]]))
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:at] + data.draw(st.binary(min_size=1, max_size=8)) + whole[at + 8 :]
    response = client.post("/predict", content=damaged, headers=PNG)
    assert response.status_code in {200, 400}


def speak(server: Server, request: bytes) -> bytes:
    """Send bytes as they are, and return the whole answer."""
    parts = urlsplit(server.url)
    assert parts.hostname and parts.port
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    ],
    ids=["nonsense", "negative length", "two lengths"],
)
def test_broken_http(server: Server, request_bytes: bytes) -> None:
    assert speak(server, request_bytes).startswith(b"HTTP/1.1 4")


def test_endless_headers(server: Server, client: httpx.Client) -> None:
    # The server closes with bytes unread, which may reset the connection.
    with contextlib.suppress(ConnectionError):
        speak(server, b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2_000_000)
    assert client.get("/livez").status_code == 200


def test_two_content_types(server: Server) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1\r\n"
    types = b"Content-Type: image/png\r\nContent-Type: application/vnd.bentoml+pickle\r\n\r\nx"
    assert speak(server, head + types).startswith(b"HTTP/1.1 415")


def test_absurd_length(server: Server) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: image/png\r\n"
    answer = speak(server, head + b"Content-Length: " + b"9" * 18 + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")


def test_client_that_leaves(server: Server, client: httpx.Client) -> None:
    parts = urlsplit(server.url)
    assert parts.hostname and parts.port
    for _ in range(5):
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            connection.sendall(head + b"Content-Length: 1000\r\n\r\nfew")
    assert client.get("/livez").status_code == 200
