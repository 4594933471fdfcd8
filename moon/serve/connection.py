"""Connection: one client's connection, cut off when the client is too slow.

uvicorn's protocol waits for ever for the end of a request's headers, for the rest of a body
that was refused, and for a client that does not read its answer. Here each of these has its
time, and the number of connections is bounded.
"""

from __future__ import annotations

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from moon.serve.limits import Limits

__all__ = ["Connection"]

# For the bytes of a request that was sent before the server stopped.
LAST_SECONDS = 0.25
_DETAILS = {
    400: "The request is not valid HTTP/1.1.",
    408: "The request's line and headers did not arrive in time.",
    431: "The request's headers are too large.",
    503: "The server has too many connections; try again later.",
}


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with deadlines.

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
        self._phase = ""
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._heard = False
        self._leaving = False
        shedding = getattr(self.app, "shedding", None)
        self._shed = _nothing if shedding is None else shedding.answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(503, {"Retry-After": str(self.limits.retry_seconds)})
        else:
            self._enter("head")

    def data_received(self, data: bytes) -> None:
        if self._between_requests() and (refusal := self._shed(data)) is not None:
            self.transport.write(refusal)
            return
        self._heard = True
        super().data_received(data)
        self._settle()

    def _between_requests(self) -> bool:
        """No request is in hand, and nothing of the next has come."""
        answered = self.cycle is None or self.cycle.response_complete
        fresh = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        return fresh and answered and not self._leaving and not self.transport.is_closing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._leaving and self.cycle.response_complete:
            self.transport.close()
        self._settle(idle=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._enter("")
        self.resume_writing()
        # uvicorn leaves its timer running after a reset.
        self._unset_keepalive_if_required()
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
        """Finish the request in hand, and one whose bytes are already on their way."""
        if self.transport.is_closing():
            return
        self._leaving = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        else:
            self._unset_keepalive_if_required()
            self._enter("last")

    def send_400_response(self, msg: str) -> None:
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        self._refuse(status if status in _DETAILS else 400, {}, str(error or ""))

    def _settle(self, *, idle: bool = False) -> None:
        """Enter the phase that the connection is in now.

        Args:
            idle: a response has just ended; uvicorn times the wait for the next request.
        """
        if self.transport.is_closing():
            self._enter("")
        elif self.conn.their_state is h11.IDLE:
            if not idle and self._phase != "last":
                self._enter("head")
            elif idle:
                self._enter("")
        elif self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete:
            self._enter("linger")
        else:
            self._enter("")

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
        }
        if phase:
            self._timer = self.loop.call_later(seconds[phase], self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self._phase == "head" and self._heard and not self.transport.is_closing():
            self._refuse(408, {})
        else:
            self.transport.close()

    def _refuse(self, status: int, headers: dict[str, str], cause: str = "") -> None:
        """Answer without the application, and close."""
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            self.transport.write(_answer(status, headers, cause))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


def _nothing(data: bytes) -> None:
    """Where nobody sheds."""


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
