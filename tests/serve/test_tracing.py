"""Spans as a collector gets them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from moon.errors import MissingExtraError, UsageError
from moon.runtime.predictor import Predictor
from moon.serve import run
from moon.serve.tracing import Tracing, check_tracing, exporter_of
from tests.serve.conftest import Server, free_port
from tests.serve.test_watch import PARENT, PNG, TRACE, talk

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")


class Collector:
    """Takes what is sent by OTLP over HTTP."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        self.services: set[str] = set()
        self.spans: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for attribute in resource.resource.attributes:
                        if attribute.key == "service.name":
                            collector.services.add(attribute.value.string_value)
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_a_served_request_is_a_span_with_its_stages(
    collector: Collector, serve: Callable[..., Server], pictures: list[bytes]
) -> None:
    server = serve(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
    with server.client() as client:
        headers = {**PNG, **PARENT, "X-Request-ID": "mine"}
        assert client.post("/predict", content=pictures[0], headers=headers).status_code == 200
    # Nothing is lost at the end.
    assert server.stop() == 0
    assert collector.services == {"moon"}
    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {"POST /predict", "decode", "queue", "inference"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    request = spans.pop("POST /predict")
    assert request.parent_span_id.hex() == "b7ad6b7169203331"
    facts = attributes(request)
    assert facts["http.route"] == "/predict"
    assert facts["http.response.status_code"] == 200
    assert facts["moon.request_id"] == "mine"
    assert facts["moon.images.accepted"] + facts["moon.images.abstained"] == 1
    order = [spans[name] for name in ("decode", "queue", "inference")]
    times = [request.start_time_unix_nano]
    for span in order:
        assert span.parent_span_id == request.span_id
        times += [span.start_time_unix_nano, span.end_time_unix_nano]
    assert times == sorted(times)
    assert times[-1] <= request.end_time_unix_nano


def test_traces_begin_here_where_the_caller_has_none(
    collector: Collector,
    predictor: Predictor,
    pictures: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collector.url}/v1/traces")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "gatekeeper")

    async def wanted(client: httpx.AsyncClient) -> None:
        await client.post("/predict", content=b"no image", headers=PNG)
        odd = {**PNG, "traceparent": "00-xyz", "Authorization": "Bearer hush-hush"}
        await client.post("/predict?secret=1", content=pictures[0], headers=odd)

    talk(predictor, wanted)
    assert collector.services == {"gatekeeper"}
    requests = [span for span in collector.spans if span.name == "POST /predict"]
    assert len(requests) == 2
    assert not any(span.parent_span_id for span in requests)
    assert requests[0].trace_id != requests[1].trace_id
    assert [attributes(span)["http.response.status_code"] for span in requests] == [400, 200]
    assert "secret" not in str(collector.spans)
    assert "hush" not in str(collector.spans)


def test_nothing_is_recorded_unless_asked_for() -> None:
    tracing = Tracing.of_environment()
    assert tracing.context({}) is None
    facts: dict[str, Any] = {
        "name": "n",
        "start": 1,
        "end": 2,
        "status": 200,
        "attributes": {},
        "stages": [],
    }
    assert tracing.record(None, **facts) is None
    assert tracing.record(tracing.context(PARENT), **facts) == TRACE
    for odd in ("", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "ff" + PARENT["traceparent"][2:]):
        assert tracing.context({"traceparent": odd}) is None


@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        ({}, "none"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"}, "none"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "True"}, "none"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
    ],
)
def test_the_variables_choose(variables: dict[str, str], kind: str) -> None:
    assert exporter_of(variables) == kind


def test_what_cannot_be_had_is_told_before_the_start(
    bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(UsageError, match=r"'zipkin'.*otlp, console, none"):
        run.serve(bundle.path, port=free_port())
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(UsageError, match=r"http/protobuf only, not grpc.*4318"):
        check_tracing()
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(MissingExtraError, match=r"\[otel\]"):
        check_tracing()
