"""The application by itself: its limits, its token, and what it says when it fails."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from moon.gate import Decision
from moon.runtime.predictor import Predictor
from moon.serve.app import MoonApp
from moon.serve.limits import Limits
from moon.serve.metrics import Metrics
from moon.serve.models import Model, Models
from moon.serve.problem import Problem
from tests.serve.apps import application, settings_of

PNG = {"Content-Type": "image/png"}
TOKEN = "0123456789abcdef"
Ask = Callable[[httpx.AsyncClient], Awaitable[Any]]


class Slow(Predictor):
    """A predictor that waits to be let go."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__(predictor.bundle, predictor.backend)
        self.go = threading.Event()

    def decide(self, *arguments: Any) -> list[Decision]:
        assert self.go.wait(20)
        return super().decide(*arguments)


class Broken(Predictor):
    """A predictor that fails in a way nobody foresaw."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__(predictor.bundle, predictor.backend)

    def decide(self, *arguments: Any) -> list[Decision]:
        raise RuntimeError("secret path /srv/models")


@pytest.fixture
def ask(predictor: Predictor) -> Iterator[Callable[..., Any]]:
    """Runs a coroutine with a client of an application made with some limits."""
    apps: list[MoonApp] = []

    def run(
        wanted: Ask, predictor: Predictor = predictor, token: str | None = None, **limits: Any
    ) -> Any:
        app = application(predictor, token=token, limits=Limits(**limits))
        apps.append(app)

        async def talk() -> Any:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                answer = await wanted(client)
            assert app.admission.requests == app.admission.bytes == 0
            return answer

        return asyncio.run(talk())

    yield run
    for app in apps:
        app.models.close()
        app.close()


def kind(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["type"].rpartition(":")[2]


def test_full_queue_is_refused(
    ask: Callable[..., Any], predictor: Predictor, pictures: list[bytes]
) -> None:
    slow = Slow(predictor)

    async def wanted(client: httpx.AsyncClient) -> None:
        posts = [client.post("/predict", content=pictures[0], headers=PNG) for _ in range(5)]
        tasks = [asyncio.create_task(post) for post in posts]
        refused, waiting = await asyncio.wait(tasks, timeout=1)
        assert (len(refused), len(waiting)) == (3, 2)
        assert (await client.get("/livez")).status_code == 200
        slow.go.set()
        answers = await asyncio.gather(*tasks)
        assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503, 503]
        for answer in answers:
            if answer.status_code == 503:
                assert kind(answer) == (503, "overloaded")
                assert answer.headers["retry-after"] == "1"

    ask(wanted, slow, queue=2)


def test_memory_for_bodies_is_bounded(ask: Callable[..., Any]) -> None:
    async def halves(gate: asyncio.Event) -> AsyncIterator[bytes]:
        yield bytes(600)
        await gate.wait()
        yield b"x"

    async def wanted(client: httpx.AsyncClient) -> None:
        gate = asyncio.Event()
        first = asyncio.create_task(client.post("/predict", content=halves(gate), headers=PNG))
        await asyncio.sleep(0.1)
        second = await client.post("/predict", content=bytes(600), headers=PNG)
        assert kind(second) == (503, "overloaded")
        gate.set()
        assert kind(await first) == (400, "undecodable")

    ask(wanted, buffered_bytes=1000)


def test_slow_body_is_refused(ask: Callable[..., Any]) -> None:
    async def never() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(20)

    async def wanted(client: httpx.AsyncClient) -> None:
        response = await client.post("/predict", content=never(), headers=PNG)
        assert kind(response) == (408, "too-slow")
        assert response.headers["connection"] == "close"

    ask(wanted, body_seconds=0.2)


def test_time_for_an_answer_is_bounded(ask: Callable[..., Any], pictures: list[bytes]) -> None:
    async def wanted(client: httpx.AsyncClient) -> None:
        response = await client.post("/predict", content=pictures[0], headers=PNG)
        assert kind(response) == (504, "timeout")

    ask(wanted, answer_seconds=0.0)


def test_limits_of_a_request(ask: Callable[..., Any], pictures: list[bytes]) -> None:
    async def wanted(client: httpx.AsyncClient) -> list[tuple[int, str]]:
        bodies = [pictures[0], bytes(100_001)]
        return [kind(await client.post("/predict", content=body, headers=PNG)) for body in bodies]

    found = ask(wanted, body_bytes=100_000, pixels=100)
    assert found == [(400, "undecodable"), (413, "too-large")]


def test_unexpected_failure_tells_nothing(
    ask: Callable[..., Any],
    predictor: Predictor,
    pictures: list[bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def wanted(client: httpx.AsyncClient) -> httpx.Response:
        headers = {**PNG, "Authorization": f"Bearer {TOKEN}", "X-Request-ID": "mine"}
        return await client.post("/predict", content=pictures[0], headers=headers)

    with caplog.at_level(logging.DEBUG):
        response = ask(wanted, Broken(predictor), token=TOKEN)
    assert kind(response) == (500, "failure")
    assert "secret" not in response.text
    assert "request mine failed" in caplog.text
    assert "secret path" in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN} {TOKEN}",
        "Bearer \xe9\xe9",
    ],
)
def test_wrong_tokens(
    ask: Callable[..., Any], pictures: list[bytes], authorization: str | None
) -> None:
    given = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}

    async def wanted(client: httpx.AsyncClient) -> None:
        for path in ("/", "/metrics", "/nowhere", "/docs", "/openapi.json", "/predict/livez"):
            response = await client.get(path, headers=given)
            assert kind(response) == (401, "unauthorised")
            assert response.headers["www-authenticate"].startswith("Bearer")
        headers = {**PNG, **given}
        response = await client.post("/predict", content=pictures[0], headers=headers)
        assert response.status_code == 401
        for path in ("/v2", "/v2/models/tiny", "/v2/models/other/ready", "/v2/health/live/"):
            response = await client.get(path, headers=given)
            assert response.status_code == 401
            assert set(response.json()) == {"error"}
            assert response.headers["www-authenticate"].startswith("Bearer")
        infer = await client.post("/v2/models/tiny/infer", json={"inputs": []}, headers=given)
        assert infer.status_code == 401
        for path in ("/livez", "/healthz", "/v2/health/live"):
            assert (await client.get(path, headers=given)).status_code == 200

    ask(wanted, token=TOKEN)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
def test_the_token_lets_in(ask: Callable[..., Any], pictures: list[bytes], scheme: str) -> None:
    async def wanted(client: httpx.AsyncClient) -> None:
        headers = {**PNG, "Authorization": f"{scheme} {TOKEN}"}
        response = await client.post("/predict", content=pictures[0], headers=headers)
        assert response.status_code == 200

    ask(wanted, token=TOKEN)


def test_not_ready_before_the_start(ask: Callable[..., Any]) -> None:
    async def wanted(client: httpx.AsyncClient) -> None:
        response = await client.get("/readyz")
        assert kind(response) == (503, "not-ready")
        assert (await client.get("/livez")).status_code == 200

    ask(wanted)


def test_settings_never_show_the_token(predictor: Predictor) -> None:
    assert TOKEN not in repr(settings_of(predictor, token=TOKEN))


def test_metrics_have_a_bounded_number_of_labels(ask: Callable[..., Any]) -> None:
    async def wanted(client: httpx.AsyncClient) -> None:
        for index in range(20):
            await client.get(f"/path-{index}")
        text = (await client.get("/metrics")).text
        assert "path-" not in text
        assert 'moon_requests_total{route="other",status="404"} 20.0' in text

    ask(wanted)


def test_readiness_tells_of_a_model_that_hangs(
    ask: Callable[..., Any], predictor: Predictor, pictures: list[bytes]
) -> None:
    slow = Slow(predictor)

    async def wanted(client: httpx.AsyncClient) -> None:
        app: MoonApp = client._transport.app  # type: ignore[attr-defined]
        app.lifecycle.ready = True
        for path in ("/readyz", "/v2/health/ready", "/v2/models/tiny/ready"):
            assert (await client.get(path)).status_code == 200
        response = await client.post("/predict", content=pictures[0], headers=PNG)
        assert kind(response) == (504, "timeout")
        await asyncio.sleep(0.2)
        assert kind(await client.get("/readyz")) == (503, "not-ready")
        for path in ("/v2/health/ready", "/v2/models/tiny/ready"):
            assert (await client.get(path)).status_code == 503
        slow.go.set()
        while (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.01)

    ask(wanted, slow, answer_seconds=0.2)


def test_a_long_wait_is_refused_at_once(
    ask: Callable[..., Any], predictor: Predictor, pictures: list[bytes]
) -> None:
    slow = Slow(predictor)

    async def wanted(client: httpx.AsyncClient) -> None:
        app: MoonApp = client._transport.app  # type: ignore[attr-defined]
        batcher = app.models.get().engine.batcher
        tasks = [
            asyncio.create_task(client.post("/predict", content=pictures[0], headers=PNG))
            for _ in range(6)
        ]
        while batcher.queued < 4:
            await asyncio.sleep(0.001)
        batcher._pace = 7.0
        refused = await client.post("/predict", content=pictures[0], headers=PNG)
        assert kind(refused) == (503, "overloaded")
        assert refused.headers["retry-after"] == "14"
        slow.go.set()
        assert {answer.status_code for answer in await asyncio.gather(*tasks)} == {200}

    ask(wanted, slow, wait_seconds=10)


def test_a_client_that_leaves_frees_its_place(
    ask: Callable[..., Any], predictor: Predictor, pictures: list[bytes]
) -> None:
    slow = Slow(predictor)

    async def wanted(client: httpx.AsyncClient) -> None:
        app: MoonApp = client._transport.app  # type: ignore[attr-defined]
        batcher = app.models.get().engine.batcher
        gone = asyncio.Event()
        sent: list[Any] = []
        messages = iter([{"type": "http.request", "body": pictures[0], "more_body": False}])

        async def receive() -> Any:
            for message in messages:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/predict", "raw_path": b"/predict",
            "query_string": b"", "headers": [(b"content-type", b"image/png")],
        }  # fmt: skip
        # Two runners are busy, so that a third waits.
        busy = [
            asyncio.create_task(client.post("/predict", content=pictures[0], headers=PNG))
            for _ in range(2)
        ]
        while batcher._idle:
            await asyncio.sleep(0.001)
        left = asyncio.create_task(app(dict(scope), receive, send))
        while not batcher.queued:
            await asyncio.sleep(0.001)
        gone.set()
        await left
        await asyncio.sleep(0.01)
        assert batcher.queued == 0
        assert app.admission.requests == 2
        slow.go.set()
        assert {answer.status_code for answer in await asyncio.gather(*busy)} == {200}

    ask(wanted, slow)


def test_the_largest_batch_of_the_backend(
    ask: Callable[..., Any], predictor: Predictor, pictures: list[bytes]
) -> None:
    few = Few(predictor)

    async def wanted(client: httpx.AsyncClient) -> None:
        files = [("image", (str(i), picture)) for i, picture in enumerate(pictures)]
        response = await client.post("/predict", files=files)
        assert response.status_code == 200
        assert len(response.json()["predictions"]) == len(pictures)

    ask(wanted, few)
    assert max(few.sizes) == 3


class Few(Predictor):
    """A predictor whose backend takes three images at once, as an engine built for three."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__(predictor.bundle, predictor.backend)
        self.sizes: list[int] = []

    @property
    def largest_batch(self) -> int:
        return 3

    def decide(self, pixels: Any, *others: Any) -> list[Decision]:
        assert len(pixels) <= 3
        self.sizes.append(len(pixels))
        return super().decide(pixels, *others)


def test_models_by_name(predictor: Predictor) -> None:
    metrics, settings = Metrics(), settings_of(predictor)
    names = ("one", "two")
    models = Models([Model.of(name, predictor, settings, metrics) for name in names], metrics)
    try:
        assert models.get().name == "one"
        assert models.get("two").facts == {"name": "two", "version": models.get().version}
        for name, version in (("three", None), ("one", "sha256:0")):
            with pytest.raises(Problem, match=r"one|three") as caught:
                models.get(name, version)
            assert caught.value.status == 404
    finally:
        models.close()
