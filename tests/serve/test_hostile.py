"""What a real server answers to requests that are wrong, or worse."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.conftest import Server
from tests.serve.hostile_requests import HOSTILE, PICKLE, bomb

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


def test_truncated_jpeg(client: httpx.Client, pictures: list[bytes]) -> None:
    half = pictures[-1][: len(pictures[-1]) // 2]
    response = client.post("/predict", content=half, headers={"Content-Type": "image/jpeg"})
    refused(response, 400, "truncated")


def test_bomb_is_not_decoded(client: httpx.Client) -> None:
    body = bomb(10_000, 9_000)
    assert len(body) < 20_000
    refused(client.post("/predict", content=body, headers=PNG), 400, "more than the limit")


def test_many_bombs_do_not_fill_the_memory(server: Server) -> None:
    # Within the limit of pixels, each takes 64 MB of grey and 192 MB of colours.
    body = bomb(8_000, 8_000)
    (worker,) = server.workers()
    before = resident(worker)
    found: list[int] = []

    def ask() -> None:
        with server.client() as client:
            found.append(client.post("/predict", content=body, headers=PNG).status_code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 4
    assert peak(worker) - before < 700e6


def resident(process: int) -> float:
    return memory(process, "VmRSS")


def peak(process: int) -> float:
    return memory(process, "VmHWM")


def memory(process: int, what: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(what))


def test_urls_are_never_fetched(server: Server, client: httpx.Client) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.3)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/image.png"
        encoded = base64.b64encode(url.encode()).decode()
        tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
        for text in (url, encoded):
            for content in (
                {"instances": [{"b64": text}]},
                {"instances": [{"url": text}]},
                {"instances": [text]},
                {"image": text},
                {"url": text},
                text,
            ):
                assert 400 <= client.post("/predict", json=content).status_code < 500
            infer = client.post(
                "/v2/models/tiny/infer", json={"inputs": [{**tensor, "data": [text]}]}
            )
            assert infer.status_code == 400
        for headers in (PNG, {"Content-Type": "text/plain"}):
            sent = client.post("/predict", content=url.encode(), headers=headers)
            assert 400 <= sent.status_code < 500
        parts: list[dict[str, Any]] = [
            {"files": {"image": (url, url.encode())}},
            {"files": {"image": (None, url)}},
            {"data": {"image": url}},
            {"params": {"image": url, "url": url}, "files": {"image": ("a", io.BytesIO(b""))}},
        ]
        for part in parts:
            assert 400 <= client.post("/predict", **part).status_code < 500
        with pytest.raises(TimeoutError):
            listener.accept()


def test_no_other_origin_is_let_in(client: httpx.Client, pictures: list[bytes]) -> None:
    origin = {"Origin": "https://example.org"}
    asked = client.options("/predict", headers={**origin, "Access-Control-Request-Method": "POST"})
    refused(asked, 405)
    answer = client.post("/predict", content=pictures[0], headers={**origin, **PNG})
    for response in (asked, answer):
        assert not [name for name in response.headers if name.startswith("access-control")]


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
    body = PICKLE
    headers = {"Content-Type": declared, "Payload-Container": "NdarrayContainer"}
    refused(client.post("/predict", content=body, headers=headers), 415)
    # Under a type that is read, the bytes are just not an image.
    refused(client.post("/predict", content=body, headers=PNG), 400)
    assert client.get("/livez").status_code == 200


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_are_refused(server: Server, name: str) -> None:
    status, headers, body = answered(speak(server, HOSTILE[name]))
    assert 400 <= status < 500, body
    assert b"root:" not in body
    told = json.loads(body)
    if headers["content-type"] == "application/problem+json":
        assert told["status"] == status
        assert len(told["detail"]) > 10
    else:
        assert headers["content-type"] == "application/json"
        assert set(told) == {"error"}
        assert len(told["error"]) > 10
    assert headers["x-content-type-options"] == "nosniff"
    assert not [one for one in headers if one.startswith("access-control") or one == "set-cookie"]


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
        answer = b""
        # What closes with bytes unread may reset the connection.
        with contextlib.suppress(ConnectionError):
            connection.sendall(request)
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                answer += chunk
        return answer


def answered(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(status.split()[1]), headers, body[: int(headers["content-length"])]


def test_endless_headers(server: Server, client: httpx.Client) -> None:
    # The server closes with bytes unread, which may reset the connection.
    with contextlib.suppress(ConnectionError):
        speak(server, b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2_000_000)
    assert client.get("/livez").status_code == 200


def test_client_that_leaves(server: Server, client: httpx.Client) -> None:
    parts = urlsplit(server.url)
    assert parts.hostname and parts.port
    for _ in range(5):
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            connection.sendall(head + b"Content-Length: 1000\r\n\r\nfew")
    assert client.get("/livez").status_code == 200
