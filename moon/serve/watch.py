"""Watch: follows every request from outside, for logs, traces and the time of its stages."""

from __future__ import annotations

import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moon.serve.logs import log_request
from moon.serve.metrics import Metrics
from moon.serve.tracing import Tracing
from moon.serve.trail import Trail, follow

__all__ = ["Watch"]

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Watch:
    """ASGI middleware around the guard.

    Args:
        app: leaves the request's id in its scope's state.
        metrics: of the worker.
        tracing: where spans go.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self.app = app
        self.metrics = metrics
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.time_ns(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with follow(self.metrics.moved) as trail:
            try:
                await self.app(scope, receive, noting)
            finally:
                trail.close()
                self._note(scope, trail, start, status)

    def _note(self, scope: Scope, trail: Trail, start: int, status: int) -> None:
        end = time.time_ns()
        route = scope.get("route")
        path = "other" if route is None else route.path
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        request_id = scope["state"]["request_id"]
        self.metrics.spent(trail.spans)
        trace_id = self.tracing.record(
            self.tracing.context(Headers(scope=scope)),
            name=f"{method} {path}",
            start=start,
            end=end,
            status=status,
            attributes={
                "http.request.method": method,
                "http.route": path,
                "http.response.status_code": status,
                "moon.request_id": request_id,
                "moon.images.accepted": trail.decided["accepted"],
                "moon.images.abstained": trail.decided.total() - trail.decided["accepted"],
            },
            stages=trail.spans,
        )
        log_request(
            trail,
            request_id=request_id,
            trace_id=trace_id,
            method=method,
            route=path,
            status=status,
            seconds=(end - start) / 1e9,
        )
