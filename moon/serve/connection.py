"""Connection: one client's connection, cut off when the client is too slow or asks too much.

uvicorn's protocol waits for ever for the end of a request's headers, for the rest of a body
that was refused, and for a client that does not read its answer; and its parser keeps whatever
headers, trailers and requests sent ahead it is given. Here each of these has its time or its
bound, and so has the number of connections.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from moon.serve.limits import Limits
from moon.serve.shedding import Place, Shedding

__all__ = ["Connection"]

# Of a request's line and headers; and of what frames a body without being any of it.
HEADER_BYTES = 32 * 1024
# Requests that wait for the answer to the one before; who sends more ahead must do so again.
MOST_AHEAD = 8
# Connections beyond the limit that are told so; more are closed at once.
MOST_TURNED_AWAY = 64
# For the bytes of a request that was sent before the server stopped.
LAST_SECONDS = 0.25
_DETAILS = {
    400: "The request is not valid HTTP/1.1.",
    408: "The request's line and headers did not arrive in time.",
    431: "The request's headers are too large.",
    503: "The server has too many connections; try again later.",
}
# How far the request that is being received has come.
_NOTHING, _HEAD, _BODY, _WHOLE = range(4)


class _NotTakenError(Exception):
    """What the parser lets through and we do not."""

    def __init__(self, status: int, cause: str = "") -> None:
        super().__init__(cause)
        self.status = status


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with deadlines and bounds.

    Args:
        limits: what a client is granted.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: Limits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.limits = limits
        self._shedding: Shedding | None = getattr(self.app, "shedding", None)
        self._place: Place | None = None
        self._received = _NOTHING
        self._moved = False
        self._framing = self._head = 0
        self._answering: RequestResponseCycle = None  # type: ignore[assignment]
        self._deaf = self._leaving = False
        self._phase = ""
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        excess = len(self.connections) - self.limits.connections
        if excess > MOST_TURNED_AWAY:
            self.transport.close()
        elif excess > 0:
            self._refuse(503, {"Retry-After": str(self.limits.retry_seconds)})
        else:
            self._enter("head")

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self._shedding is not None and self._between_requests():
            came = self._shedding.receive(data)
            if isinstance(came, bytes):
                self.transport.write(came)
                self._wait_for_next()
                return
            self._place = came
        self._unset_keepalive_if_required()
        self._moved = False
        self._parse(data)
        if self._place is not None:
            self._seat(self._place)
        self._framing = 0 if self._moved else self._framing + len(data)
        if self._framing > HEADER_BYTES and not self._deaf:
            self._fail(431)
        self._settle()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._received, self._head = _HEAD, 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._head += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Those behind a body came too late for who reads the headers.
        if self._received == _HEAD:
            super().on_header(name, value)
            self._head += len(name) + len(value) + len(": \r\n")

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MOST_AHEAD:
            self._finish()
        if self._deaf:
            return
        if self._head > HEADER_BYTES:
            raise _NotTakenError(431)
        if self.parser.get_method() == b"CONNECT":
            raise _NotTakenError(400, "CONNECT is for proxies")
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            raise _NotTakenError(400, "there must be one Host header")
        if self.parser.should_upgrade():
            return  # read again, see `_parse`
        super().on_headers_complete()
        self._received, self._moved = _BODY, True

    def on_body(self, body: bytes) -> None:
        if self._received == _BODY:
            super().on_body(body)
            self._moved = True

    def on_message_complete(self) -> None:
        if self._received == _BODY:
            super().on_message_complete()
            self._received, self._moved = _WHOLE, True

    def on_response_complete(self) -> None:
        self._leave_place()
        super().on_response_complete()
        if self._leaving and not self._in_hand():
            self.transport.close()
        self._settle(idle=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._enter("")
        self._leave_place()
        self.resume_writing()
        # uvicorn leaves its timer running after a reset.
        self._unset_keepalive_if_required()
        # It tells the newest request only.
        if self._answering is not None and not self._answering.response_complete:
            _disconnect(self._answering)
        self.pipeline.clear()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def shutdown(self) -> None:
        """Finish the requests in hand, and one whose bytes are already on their way."""
        if self._phase == "hung up":
            self.transport.close()
        if self.transport.is_closing():
            return
        self._leaving = True
        if self._in_hand():
            self.cycle.keep_alive = False
        else:
            self._unset_keepalive_if_required()
            self._enter("last")

    def _fail_by(self, error: BaseException) -> None:
        cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
        self._fail(cause.status if isinstance(cause, _NotTakenError) else 400, str(cause or ""))

    def _parse(self, data: bytes) -> None:
        """Take in what came, as uvicorn's does, except for a wish for another protocol.

        Such a request is answered as if it had not asked. The parser ends it at its headers,
        whatever body it has, and so reads it again without the wish.
        """
        while not self._deaf:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as asked:
                data = self._without_upgrade() + data[asked.args[0] :]
            except httptools.HttpParserError as error:
                self._fail_by(error)
            else:
                return

    def _without_upgrade(self) -> bytes:
        kept = [b"%b: %b\r\n" % pair for pair in self.headers if pair[0] != b"upgrade"]
        version = self.parser.get_http_version().encode()
        line = b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, version)
        return line + b"".join(kept) + b"\r\n"

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _seat(self, place: Place) -> None:
        """Hand the place that was kept for a request to the application."""
        if self._received == _WHOLE and self._in_hand():
            self.scope.setdefault("state", {})["place"] = place
        else:
            self._leave_place()

    def _leave_place(self) -> None:
        if self._place is not None:
            self._place.leave()
            self._place = None

    def _in_hand(self) -> bool:
        """Some request has not been answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def _between_requests(self) -> bool:
        """No request is in hand, and nothing of the next has come."""
        fresh = self._received in (_NOTHING, _WHOLE)
        return fresh and not self._in_hand() and not self._leaving

    def _wait_for_next(self) -> None:
        """As after an answer."""
        self._enter("")
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def _settle(self, *, idle: bool = False) -> None:
        """Enter the phase that the connection is in now.

        Args:
            idle: a response has just ended; uvicorn times the wait for the next request.
        """
        if self._phase == "hung up":
            return
        if self.transport.is_closing() or self._in_hand():
            self._enter("")
        elif self._received == _BODY:
            self._enter("linger")
        elif idle and self._received != _HEAD:
            self._enter("")
        elif self._phase != "last":
            self._enter("head")

    def _enter(self, phase: str) -> None:
        if phase == self._phase:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._phase = phase
        seconds = {
            "head": self.limits.head_seconds,
            "linger": self.limits.linger_seconds,
            "last": LAST_SECONDS,
            "hung up": self.limits.linger_seconds,
        }
        if phase:
            self._timer = self.loop.call_later(seconds[phase], self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self._phase == "head" and self._received == _HEAD:
            self._refuse(408, {})
        else:
            self.transport.close()

    def _fail(self, status: int, cause: str = "") -> None:
        """What is being received is no request: answer those before it, or it, and close."""
        broken = self._received == _BODY
        if broken and self.pipeline:
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._answering
            broken = False
        if self._in_hand() and not broken:
            self._finish()
        else:
            self._refuse(status, {}, cause)

    def _finish(self) -> None:
        """Hear no more, and close when those in hand are answered."""
        self._deaf = True
        self.cycle.keep_alive = False

    def _refuse(self, status: int, headers: dict[str, str], cause: str = "") -> None:
        """Answer without the application, and close when the client has heard it."""
        self._deaf = True
        if self.transport.is_closing():
            return
        if self._received != _BODY or not self.cycle.response_started:
            self.transport.write(_answer(status, headers, cause))
        if self._in_hand():
            _disconnect(self.cycle)
        # Closing would reset the connection of a client that still sends, and lose the answer.
        self.flow.resume_reading()
        self.transport.write_eof()
        self._unset_keepalive_if_required()
        self._enter("hung up")


def _disconnect(cycle: RequestResponseCycle) -> None:
    """Nobody waits for this answer any more."""
    cycle.disconnected = True
    cycle.message_event.set()


def _answer(status: int, headers: dict[str, str], cause: str) -> bytes:
    """A whole response that tells a problem (RFC 9457)."""
    phrase = HTTPStatus(status).phrase
    problem = {
        "type": "urn:moon:problem:connection",
        "title": phrase,
        "status": status,
        "detail": f"{_DETAILS[status]} {cause[:200]}".strip(),
        "request_id": None,
    }
    body = json.dumps(problem).encode()
    lines = {
        "Content-Type": "application/problem+json",
        "Content-Length": str(len(body)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        **headers,
        "Connection": "close",
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} {phrase}\r\n{head}\r\n".encode() + body
