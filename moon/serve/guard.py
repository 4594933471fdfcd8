"""Guard: what happens around every request, whatever its route.

It gives the request an id, asks for the token, turns whatever goes wrong into
problem+json, adds the security headers and counts. It logs an unexpected failure with the
request's id and nothing the client sent.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moon.serve.lifecycle import Lifecycle
from moon.serve.metrics import Metrics
from moon.serve.problem import Problem, problem_response

__all__ = ["HEADERS", "OPEN_ROUTES", "Guard", "id_of"]

OPEN_ROUTES = frozenset(
    {"/livez", "/readyz", "/healthz", "/v2/health/live", "/v2/health/ready", "/ui"}
)
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_ROUTING = {
    "no-such-route": "There is nothing here; GET / lists what there is.",
    "wrong-method": "This route does not take that method.",
}
logger = logging.getLogger("moon.serve")


class Guard:
    """ASGI middleware around `app`.

    Args:
        app: answers, or raises Problem or the router's HTTPException. What is counted is the
            path of the route that it found, as in the table of routes.
        token: what ``Authorization: Bearer`` must carry, None for nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        lifecycle: Lifecycle,
        metrics: Metrics,
    ) -> None:
        self.app = app
        self.lifecycle = lifecycle
        self.metrics = metrics
        self._digest = None if token is None else _digest(token.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # There are no web sockets here; an ASGI server turns this into a 403.
            await send({"type": "websocket.close", "code": 1000})
            return
        start, status = time.perf_counter(), 500
        headers = Headers(scope=scope)
        request_id = id_of(headers.get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = request_id

        async def decorated(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._decorate(MutableHeaders(scope=message), request_id)
            await send(message)

        with self.metrics.in_flight.track_inprogress():
            await self._answer(scope, receive, decorated, headers, request_id)
        route = scope.get("route")
        path = "other" if route is None else route.path
        self.metrics.answered(path, status, time.perf_counter() - start)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, headers: Headers, request_id: str
    ) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._authorise(scope["path"], headers)
            await self.app(scope, receive, watched)
        except Problem as problem:
            await problem_response(problem, request_id, scope["path"])(scope, receive, watched)
        except HTTPException as error:
            kind = "no-such-route" if error.status_code == 404 else "wrong-method"
            refusal = Problem(error.status_code, kind, _ROUTING[kind], headers=error.headers)
            await problem_response(refusal, request_id, scope["path"])(scope, receive, watched)
        except Exception:
            logger.exception("request %s failed", request_id)
            if started:
                raise
            detail = "The server failed; its log names the cause beside this request's id."
            failure = Problem(500, "failure", detail)
            await problem_response(failure, request_id, scope["path"])(scope, receive, watched)

    def _authorise(self, path: str, headers: Headers) -> None:
        if self._digest is None or path in OPEN_ROUTES:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # Digests have one length, so the comparison's time tells nothing about the token.
        # Headers reach us as latin-1, whose encoding gives the client's bytes back.
        right = hmac.compare_digest(_digest(token.strip().encode("latin-1")), self._digest)
        if scheme.lower() != "bearer" or not right:
            challenge = {"WWW-Authenticate": 'Bearer realm="moon"'}
            detail = "A valid token is needed: Authorization: Bearer TOKEN."
            raise Problem(401, "unauthorised", detail, headers=challenge)

    def _decorate(self, headers: MutableHeaders, request_id: str) -> None:
        headers["X-Request-ID"] = request_id
        for name, value in HEADERS.items():
            headers.setdefault(name, value)
        if self.lifecycle.draining:
            headers["Connection"] = "close"


def id_of(given: str = "") -> str:
    """What a request is called: as the client says where that is safe to repeat."""
    return given if _SAFE_ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
