"""Connection: one client's connection, cut off when the client is too slow or asks too much.

uvicorn's protocol waits for ever for the end of a request's headers, for the rest of a body
that was refused, and for a client that does not read its answer; and it closes on a client that
still sends, who then never hears why. Here each of these has its time, and the number of
connections is bounded.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from moon.serve.bounded import BODY, HEAD, NOTHING, WHOLE, Bounded
from moon.serve.limits import Limits
from moon.serve.shedding import Place, Shedding

__all__ = ["Connection"]

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


class Connection(Bounded):
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
        self._shedding: Shedding | None = getattr(self.app, "shedding", None)
        self._place: Place | None = None
        self._leaving = False
        self._phase = ""
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._raw = transport
        super().connection_made(_Heard(transport, self))  # type: ignore[arg-type]
        excess = len(self.connections) - self.limits.connections
        if excess > MOST_TURNED_AWAY:
            self._close()
        elif excess > 0:
            self.refuse(503)
        else:
            self._enter("head")

    @property
    def closing(self) -> bool:
        """Nothing more is said to the client."""
        return self._phase == "hung up" or self._raw.is_closing()

    def data_received(self, data: bytes) -> None:
        if self.deaf:
            return
        if self._shedding is not None and self._between_requests():
            came = self._shedding.receive(data)
            if isinstance(came, bytes):
                self._raw.write(came)
                self._wait_for_next()
                return
            self._place = came
        self._unset_keepalive_if_required()
        self.take(data)
        if self._place is not None:
            self._seat(self._place)
        self._settle()

    def on_response_complete(self) -> None:
        self._leave_place()
        super().on_response_complete()
        if self._leaving and not self.in_hand():
            self.hang_up()
        self._settle(idle=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._enter("")
        self._leave_place()
        self.resume_writing()
        # uvicorn leaves its timer running after a reset, and tells the newest request only.
        self._unset_keepalive_if_required()
        self.disconnect()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def shutdown(self) -> None:
        """Finish the requests in hand, and one whose bytes are already on their way."""
        if self.closing:
            self._close()
            return
        self._leaving = True
        if self.in_hand():
            self.cycle.keep_alive = False
        else:
            self._unset_keepalive_if_required()
            self._enter("last")

    def refuse(self, status: int, cause: str = "") -> None:
        """Answer without the application, and close."""
        self.deaf = True
        if self.closing:
            return
        if self.received != BODY or not self.cycle.response_started:
            retry = {"Retry-After": str(self.limits.retry_seconds)} if status == 503 else {}
            self._raw.write(_answer(status, retry, cause))
        self.headers = []
        self.disconnect()
        self.hang_up()

    def hang_up(self) -> None:
        """Close, after what was written is heard.

        Closing resets the connection of a client that still sends, and may take from it what it
        had not read yet.
        """
        if self.closing:
            return
        if not self.deaf and self.received != BODY:
            self._close()
            return
        self.deaf = True
        self.flow.resume_reading()
        self._raw.write_eof()
        self._unset_keepalive_if_required()
        self._enter("hung up")

    def _close(self) -> None:
        if self._raw.get_write_buffer_size():
            self._await_reader()
        self._raw.close()

    def _await_reader(self) -> None:
        if self._writing is None:
            self._writing = self.loop.call_later(self.limits.write_seconds, self._raw.abort)

    def _seat(self, place: Place) -> None:
        """Hand the place that was kept for a request to the application."""
        if self.received == WHOLE and self.in_hand():
            self.scope.setdefault("state", {})["place"] = place
        else:
            self._leave_place()

    def _leave_place(self) -> None:
        if self._place is not None:
            self._place.leave()
            self._place = None

    def _between_requests(self) -> bool:
        """No request is in hand, nothing of the next has come, and all answers were read.

        Who does not read could hold a place as long as writing may take.
        """
        fresh = self.received in (NOTHING, WHOLE) and not self.in_hand()
        return fresh and not self._leaving and not self._raw.get_write_buffer_size()

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
        if self.closing or self.in_hand():
            self._enter("")
        elif self.received == BODY:
            self._enter("linger")
        elif idle and self.received != HEAD:
            self._enter("")
        elif self._phase == "linger" and self.received == WHOLE:
            if self._leaving:
                self._close()
            else:
                self._wait_for_next()
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
            "hung up": self.limits.linger_seconds,
            "last": LAST_SECONDS,
        }
        if phase:
            self._timer = self.loop.call_later(seconds[phase], self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self._phase == "head" and self.received == HEAD:
            self.refuse(408)
        else:
            self._close()


class _Heard:
    """A transport that hangs up where uvicorn would close."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport, self._connection = transport, connection

    def write(self, data: bytes) -> None:
        """Unless the client has been told that no more comes."""
        if not self._connection.closing:
            self._transport.write(data)

    def close(self) -> None:
        """As soon as the client has heard what was written."""
        self._connection.hang_up()

    def is_closing(self) -> bool:
        """Whether nothing more is said."""
        return self._connection.closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


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
