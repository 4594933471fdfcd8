"""Tracing: OpenTelemetry spans of requests and their stages, where somebody collects them.

The standard variables configure it: OTEL_TRACES_EXPORTER (``otlp``, ``console`` or ``none``;
``otlp`` by itself where OTEL_EXPORTER_OTLP_ENDPOINT or its TRACES twin is set), OTEL_SERVICE_NAME,
OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_SDK_DISABLED and those of the exporter.
Without them nothing is recorded or sent, and only the caller's trace id is read, for the log.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from moon import __version__
from moon.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

    from moon.serve.trail import Span

__all__ = ["Tracing", "check_tracing", "exporter_of"]

EXPORTERS = ("otlp", "console", "none")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """Records requests as spans.

    Args:
        provider: of tracers; None records nothing.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = None if provider is None else provider.get_tracer("moon.serve", __version__)

    @classmethod
    def of_environment(cls) -> Tracing:
        """As the environment's variables say.

        Raises:
            UsageError: they name an exporter or protocol that we do not have.
            MissingExtraError: the exporter's package is not installed.
        """
        kind = exporter_of(os.environ)
        if kind == "none":
            return cls()
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

        named = os.environ.get("OTEL_SERVICE_NAME")
        facts = {} if named else {"service.name": "moon"}
        provider = TracerProvider(resource=Resource.create(facts))
        exporter = _otlp() if kind == "otlp" else ConsoleSpanExporter()
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def context(self, headers: Mapping[str, str]) -> Context | None:
        """The caller's, from a valid ``traceparent``; else None."""
        if "traceparent" not in headers:
            return None
        found = _PROPAGATOR.extract(headers)
        valid = trace.get_current_span(found).get_span_context().is_valid
        return found if valid else None

    def record(
        self,
        context: Context | None,
        *,
        name: str,
        start: int,
        end: int,
        status: int,
        attributes: Mapping[str, str | int],
        stages: Sequence[Span],
    ) -> str | None:
        """A request's spans, after the fact.

        Args:
            context: the caller's.
            name: method and route.
            start, end: nanoseconds since the epoch.
            status: of the answer.
            attributes: of the request's span.
            stages: its children.

        Returns:
            The trace's id, 32 hexadecimal digits, also where only the caller has one.
        """
        if self._tracer is None:
            if context is None:
                return None
            return _trace_id(trace.get_current_span(context))
        request = self._tracer.start_span(
            name, context, SpanKind.SERVER, attributes=dict(attributes), start_time=start
        )
        inside = trace.set_span_in_context(request)
        for stage in stages:
            child = self._tracer.start_span(stage.stage, inside, start_time=stage.start)
            child.end(stage.end)
        if status >= 500:
            request.set_status(StatusCode.ERROR)
        request.end(end)
        return _trace_id(request)

    def close(self) -> None:
        """Send what has not been sent yet."""
        if self._provider is not None:
            self._provider.shutdown()


def exporter_of(environment: Mapping[str, str]) -> str:
    """Which exporter the variables ask for, one of `EXPORTERS`.

    Raises:
        UsageError: another one.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return "none"
    asked = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if not asked:
        return "otlp" if any(environment.get(name) for name in _ENDPOINTS) else "none"
    if asked not in EXPORTERS:
        raise UsageError(
            f"OTEL_TRACES_EXPORTER is {asked!r}", remedy=f"Set one of {', '.join(EXPORTERS)}"
        )
    return asked


def check_tracing() -> None:
    """Find out before the start whether what the variables ask for is there.

    Raises:
        UsageError, MissingExtraError: see `Tracing.of_environment`.
    """
    if exporter_of(os.environ) == "otlp":
        _otlp().shutdown()


def _otlp() -> SpanExporter:
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"
    )
    if protocol != "http/protobuf":
        raise UsageError(
            f"traces are sent by http/protobuf only, not {protocol}",
            remedy="Set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, on port 4318 of most collectors",
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise MissingExtraError(
            "opentelemetry-exporter-otlp-proto-http", "otel", "sending traces"
        ) from error
    return OTLPSpanExporter()


def _trace_id(span: trace.Span) -> str:
    return trace.format_trace_id(span.get_span_context().trace_id)
