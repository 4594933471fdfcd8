"""Requests refused before they are parsed: the same words, and never half a request."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import h11
import httpx
import pytest

from moon.runtime.predictor import Predictor
from moon.serve.app import MoonApp
from moon.serve.limits import Limits
from moon.serve.shedding import Place
from tests.serve.apps import application
from tests.serve.conftest import Server

BODY = b"not decoded"
HEAD = (
    f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(BODY)}"
)
REQUEST = HEAD.encode() + b"\r\n\r\n" + BODY


@pytest.fixture
def app(predictor: Predictor) -> Iterator[MoonApp]:
    """Of a worker with one place, which is taken."""
    made = application(predictor, limits=Limits(queue=1))
    made.lifecycle.ready = True
    made.admission.requests = 1
    yield made
    made.models.close()
    made.close()


def parsed(answer: object) -> httpx.Response:
    assert isinstance(answer, bytes)
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(answer)
    head, body = connection.next_event(), b""
    assert isinstance(head, h11.Response)
    while isinstance(event := connection.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage) and not connection.trailing_data[0]
    return httpx.Response(head.status_code, headers=list(head.headers), content=body)


def test_it_is_told_as_on_the_long_way(app: MoonApp) -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post(
                "/predict", content=BODY, headers={"Content-Type": "image/png"}
            )

    short, long = parsed(app.shedding.receive(REQUEST)), asyncio.run(ask())
    assert short.status_code == long.status_code == 503
    plain, other = short.json(), long.json()
    assert plain.pop("request_id") == short.headers.pop("x-request-id")
    assert other.pop("request_id") == long.headers.pop("x-request-id")
    assert plain == other
    # Ids are of one length, and so are the bodies.
    assert dict(short.headers) == dict(long.headers) and "retry-after" in short.headers
    text = app.metrics.exposition().decode()
    assert 'moon_requests_total{route="/predict",status="503"} 2.0' in text


@pytest.mark.parametrize(
    "data",
    [
        REQUEST[:-1],
        REQUEST + b"G",
        REQUEST + REQUEST,
        REQUEST[:40],
        REQUEST.replace(b"POST", b"PUT"),
        REQUEST.replace(b"/predict", b"/predict/tiny"),
        REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0"),
        HEAD.encode() + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + BODY,
        HEAD.encode() + b"\r\ntransfer-encoding : chunked\r\n\r\n" + BODY,
        HEAD.encode() + b"\r\nExpect: 100-continue\r\n\r\n" + BODY,
        HEAD.encode() + b"\r\nConnection: close\r\n\r\n" + BODY,
        HEAD.encode() + b"\r\nContent-Length: 11\r\n\r\n" + BODY,
        HEAD.encode() + b"\r\nX: a\r\n content-length: 3\r\n\r\n" + BODY,
        HEAD.encode() + b"\r\nX: " + b"a" * 9000 + b"\r\n\r\n" + BODY,
        REQUEST.replace(b": 11", b": +11"),
        REQUEST.replace(b": 11", b": 11, 11"),
        b"",
    ],
)
def test_what_is_uncommon_goes_the_long_way(app: MoonApp, data: bytes) -> None:
    assert app.shedding.receive(data) is None


def test_who_has_room_or_is_leaving_sheds_nothing(app: MoonApp) -> None:
    app.admission.requests = 0
    place = app.shedding.receive(REQUEST)
    assert isinstance(place, Place) and app.admission.requests == 1
    assert isinstance(app.shedding.receive(REQUEST), bytes)
    place.leave()
    place.leave()
    assert app.admission.requests == 0
    app.admission.requests, app.lifecycle.draining = 1, True
    assert app.shedding.receive(REQUEST) is None


def test_connections_go_on_after_a_refusal(
    serve: Callable[..., Server], pictures: list[bytes]
) -> None:
    server = serve(MOON_SERVE_QUEUE="1")
    answers: Counter[int] = Counter()

    def ask(number: int) -> None:
        with server.client() as client:
            for i in range(40):
                image = pictures[(number + i) % len(pictures)]
                answer = client.post("/predict", content=image, headers={"Content-Type": "image/x"})
                answers[answer.status_code] += 1
                if answer.status_code == 503:
                    assert answer.json()["request_id"] == answer.headers["x-request-id"]
                    assert int(answer.headers["retry-after"]) >= 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(6)))
    assert set(answers) == {200, 503} and answers.total() == 240
    assert not server.errors()


@pytest.mark.parametrize(
    ("given", "kept"), [("mine-1", True), ("a b", False), ("x" * 65, False), ("\xe4", False)]
)
def test_the_clients_own_id_is_kept(app: MoonApp, given: str, kept: bool) -> None:
    line = f"\r\nX-Request-Id: {given}\r\n\r\n".encode("latin-1")
    told = parsed(app.shedding.receive(REQUEST.replace(b"\r\n\r\n", line)))
    assert told.json()["request_id"] == told.headers["x-request-id"]
    assert (told.headers["x-request-id"] == given) == kept


@pytest.mark.parametrize("line", [b"\nX: 1", b"\r\nX: a\rb", b"\r\nX: a\0b"])
def test_what_the_parser_refuses_goes_the_long_way(app: MoonApp, line: bytes) -> None:
    assert app.shedding.receive(REQUEST.replace(b"\r\n\r\n", line + b"\r\n\r\n")) is None
