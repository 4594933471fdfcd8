"""What can be seen of a service: figures, log lines, and one drift test for all workers."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moon.bundle import Bundle
from moon.drift import DriftTest
from moon.errors import UsageError
from moon.runtime.predictor import Predictor
from moon.serve.ledger import GATHER_SECONDS
from moon.serve.logs import JsonFormatter, TextFormatter, configuration
from moon.serve.trail import Trail, current
from tests.serve.apps import application, settings_of
from tests.serve.conftest import Server, until

PNG = {"Content-Type": "image/png"}
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
TOKEN = "0123456789abcdef"
Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]


def figures(text: str) -> Figures:
    """Every sample of an exposition; it must parse, and name no sample twice."""
    found: Figures = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


BY_MODEL = ("decisions", "unreadable", "score", "p_value", "batch_size", "drift")


def one(found: Figures, name: str, **labels: str) -> float:
    if name.startswith(BY_MODEL):
        labels = {"model": "tiny", **labels}
    return found[f"moon_{name}", frozenset(labels.items())]


def talk(predictor: Predictor, wanted: Callable[[httpx.AsyncClient], Any], **settings: Any) -> Any:
    """Run a coroutine with a client of an application of its own."""
    app = application(predictor, **settings)

    async def run() -> Any:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await wanted(client)

    try:
        return asyncio.run(run())
    finally:
        app.models.close()
        app.close()


def test_figures_of_what_was_decided(
    predictor: Predictor, pictures: list[bytes], bundle: Bundle
) -> None:
    decisions = predictor.predict(pictures)

    async def wanted(client: httpx.AsyncClient) -> str:
        files = [("image", (f"{i}.png", data)) for i, data in enumerate([*pictures, b"no image"])]
        assert (await client.post("/predict", files=files)).status_code == 200
        return (await client.get("/metrics")).text

    found = figures(talk(predictor, wanted))
    reasons = [decision.reason or "" for decision in decisions]
    for reason in set(reasons):
        outcome = "abstain" if reason else "accept"
        count = reasons.count(reason)
        assert one(found, "decisions_total", decision=outcome, reason=reason) == count
    assert one(found, "unreadable_images_total") == 1
    gate = bundle.gate()
    assert gate is not None
    # The bucket that ends at the threshold has what is below it, and what ties with it.
    scores = [decision.score for decision in decisions if decision.score is not None]
    below = sum(score <= gate.threshold for score in scores)
    edges = {float(dict(labels)["le"]): value for (name, labels), value in found.items()
             if name == "moon_score_bucket"}  # fmt: skip
    assert edges[gate.threshold] == below
    assert edges[math.inf] == len(scores) == one(found, "score_count")
    assert one(found, "p_value_count") == len(decisions)
    assert one(found, "batch_size_sum") == len(decisions)
    assert 1 <= one(found, "batch_size_count") < len(decisions)
    for stage in ("decode", "queue", "inference"):
        assert one(found, "stage_seconds_count", stage=stage) == 1
        assert one(found, "requests_in_stage", stage=stage) == 0
    expected = DriftTest.of(gate).watch(
        [not decision.accepted for decision in decisions],
        [decision.threshold for decision in decisions],
    )
    assert one(found, "drift_e_value") == pytest.approx(expected.e_value)
    assert one(found, "drift_detector") == pytest.approx(expected.detector)
    assert one(found, "drift_images") == len(decisions)
    assert one(found, "drift_rejected") == expected.rejected
    assert one(found, "drift_bound") == pytest.approx(max(DriftTest.of(gate).bounds.values()))


def test_a_given_threshold_is_not_tested(bundle: Bundle, pictures: list[bytes]) -> None:
    predictor = Predictor.open(bundle, threshold=0.0, warn=lambda _: None)

    async def wanted(client: httpx.AsyncClient) -> str:
        assert (await client.post("/predict", content=pictures[0], headers=PNG)).is_success
        return (await client.get("/metrics")).text

    text = talk(predictor, wanted, threshold=0.0)
    assert "moon_drift" not in text
    assert one(figures(text), "score_count") == 1


def test_stages_are_left_whatever_happens(predictor: Predictor) -> None:
    moves: list[tuple[str | None, str | None]] = []
    trail = Trail(lambda left, entered: moves.append((left, entered)))
    trail.enter("decode")
    trail.enter("queue")
    trail.close()
    # A thread that only now gets to a request given up on.
    trail.enter("inference")
    assert moves == [(None, "decode"), ("decode", "queue"), ("queue", None)]
    assert [span.stage for span in trail.spans] == ["decode", "queue"]
    assert current().spans == []


class Lines(logging.Handler):
    """Keeps formatted lines."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def lines() -> Any:
    """Log lines of requests, as JSON and as text."""
    logger = logging.getLogger("moon.serve")
    handlers = [Lines(JsonFormatter()), Lines(TextFormatter())]
    requests = logging.getLogger("moon.serve.requests")
    requests.setLevel(logging.INFO)
    for handler in handlers:
        logger.addHandler(handler)
    yield [handler.lines for handler in handlers]
    for handler in handlers:
        logger.removeHandler(handler)
    requests.setLevel(logging.NOTSET)


def test_a_request_is_one_line(
    predictor: Predictor, pictures: list[bytes], lines: list[list[str]]
) -> None:
    decisions = predictor.predict(pictures)

    async def wanted(client: httpx.AsyncClient) -> None:
        secret = {"Authorization": f"Bearer {TOKEN}", **PARENT}
        files = [("image", (f"patient-{i}.png", data)) for i, data in enumerate(pictures)]
        await client.post("/predict?key=hush", files=[*files, ("image", b"no")], headers=secret)
        await client.get("/private-path", headers=secret)
        await client.request("BREW\N{LATIN SMALL LETTER E WITH ACUTE}", "/livez")
        await client.post("/predict", content=pictures[0], headers=PNG)

    talk(predictor, wanted, token=TOKEN)
    first, second, third, fourth = map(json.loads, lines[0])
    assert first["message"] == "request"
    assert first["level"] == "info"
    assert first["time"].endswith("Z")
    assert first["request_id"].startswith("req-")
    assert first["trace_id"] == TRACE
    assert (first["method"], first["route"], first["status"]) == ("POST", "/predict", 200)
    abstained: dict[str, int] = {}
    for decision in decisions:
        if decision.reason:
            abstained[decision.reason] = abstained.get(decision.reason, 0) + 1
    accepted = sum(decision.accepted for decision in decisions)
    assert first["images"] == {"accepted": accepted, "abstained": abstained, "unreadable": 1}
    stages = sum(first[f"{stage}_seconds"] for stage in ("decode", "queue", "inference"))
    assert 0 < stages <= first["seconds"]
    assert (second["route"], second["status"], second["trace_id"]) == ("other", 404, TRACE)
    assert "images" not in second
    assert third["method"] == "OTHER"
    assert (fourth["status"], fourth["trace_id"]) == (401, None)
    everything = "\n".join(lines[0] + lines[1])
    for hidden in (TOKEN, "patient", "hush", "private", "BREW", *predictor.bundle.classes):
        assert hidden not in everything
    assert "route=/predict status=200" in lines[1][0]
    assert "trace_id" not in lines[1][3]


def test_no_line_where_none_is_wanted(
    predictor: Predictor, pictures: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async def wanted(client: httpx.AsyncClient) -> None:
        await client.post("/predict", content=pictures[0], headers=PNG)

    talk(predictor, wanted)
    assert not [record for record in caplog.records if record.name.startswith("moon")]


def test_failures_are_lines_of_json() -> None:
    formatter = configuration("json", requests=False)["formatters"]["chosen"]["()"]()
    try:
        raise RuntimeError("first\nsecond")
    except RuntimeError as error:
        what = (RuntimeError, error, error.__traceback__)
        record = logging.LogRecord("n", logging.ERROR, "", 0, "request %s", ("a",), what)
    text = formatter.format(record)
    assert "\n" not in text
    fields = json.loads(text)
    assert (fields["level"], fields["message"]) == ("error", "request a")
    assert fields["exception"].endswith("first\nsecond")


def test_an_unknown_log_format_is_refused(predictor: Predictor) -> None:
    with pytest.raises(UsageError, match="--log-format"):
        settings_of(predictor, log_format="xml")


def test_workers_share_what_is_seen(
    serve: Callable[..., Server], pictures: list[bytes], predictor: Predictor, tmp_path: Path
) -> None:
    """Of two workers, a death at rest and a restart: no image is lost or counted twice."""
    state = str(tmp_path / "drift.state")
    options = ["--workers", "2", "--log-format", "json", "--log-requests", "--drift-state", state]
    server = serve(*options)
    decisions = predictor.predict(pictures)

    def ask(index: int) -> int:
        # A connection of its own, so that both workers get some.
        with server.client() as client:
            return client.post("/predict", content=pictures[index], headers=PNG).status_code

    def images() -> int:
        time.sleep(2 * GATHER_SECONDS)
        with server.client() as client:
            found = figures(client.get("/metrics").text)
        decided = sum(value for (name, _), value in found.items() if name == "moon_decisions_total")
        assert one(found, "drift_images") == decided == one(found, "score_count")
        rejected = one(found, "drift_rejected")
        assert rejected == sum(
            value for (name, labels), value in found.items()
            if name == "moon_decisions_total" and ("decision", "abstain") in labels
        )  # fmt: skip
        return int(decided)

    count = len(decisions)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(count))) == {200}
    assert images() == count
    lines = [json.loads(line) for line in server.errors().splitlines()]
    assert sum(line["route"] == "/predict" for line in lines) == count
    first = server.workers()[0]
    os.kill(first, signal.SIGKILL)
    until(lambda: len(server.workers()) == 2 and first not in server.workers())
    until(lambda: ask(0) == 200)
    assert images() >= count + 1
    with server.client() as client:
        before = figures(client.get("/metrics").text)
    assert server.stop() == 0
    assert all(json.loads(line) for line in server.errors().splitlines())
    # Its evidence outlives the service; its counters, as Prometheus expects, do not.
    again = serve(*options)
    with again.client() as client:
        after = figures(client.get("/metrics").text)
    for name in ("drift_images", "drift_e_value", "drift_detector"):
        assert one(after, name) == one(before, name)
    assert ("moon_decisions_total", frozenset()) not in after


def test_a_state_that_cannot_be_written(bundle: Bundle, tmp_path: Path) -> None:
    from moon.serve import run
    from tests.serve.conftest import free_port

    with pytest.raises(UsageError, match="drift test's state"):
        run.serve(bundle.path, port=free_port(), drift_state=tmp_path / "none" / "file")
