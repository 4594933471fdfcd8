"""Bounded: uvicorn's HTTP/1.1 protocol with bounds on what the parser takes in.

The parser keeps whatever headers, trailers and requests sent ahead it is given, and lets requests
through that name no host, or several. A request is taken in here only as far as the bounds go.
"""

from __future__ import annotations

from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

__all__ = ["BODY", "HEAD", "HEADER_BYTES", "MOST_AHEAD", "NOTHING", "WHOLE", "Bounded"]

# Of a request's line and headers; and of what frames a body without being any of it.
HEADER_BYTES = 32 * 1024
# What a header takes beyond its bytes, as HTTP/2 counts (RFC 9113, section 6.5.2).
OVERHEAD_BYTES = 32
# Requests that wait for the answer to the one before; who sends more ahead must do so again.
MOST_AHEAD = 8
# How far the request that is being received has come.
NOTHING, HEAD, BODY, WHOLE = range(4)


class _NotTakenError(Exception):
    """What the parser lets through and we do not."""

    def __init__(self, status: int, cause: str = "") -> None:
        super().__init__(cause)
        self.status = status


class Bounded(HttpToolsProtocol):
    """A connection that hears no more of a client than the bounds allow.

    Attributes:
        received: how far the request that is being received has come.
        deaf: nothing more is taken in.
    """

    received = NOTHING
    deaf = False
    _answering: RequestResponseCycle = None  # type: ignore[assignment]
    _moved = False
    _framing = _head = _ahead = 0

    def refuse(self, status: int, cause: str = "") -> None:
        """Answer without the application, and close."""
        raise NotImplementedError

    def in_hand(self) -> bool:
        """Some request has not been answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def take(self, data: bytes) -> None:
        """Take in what came, as uvicorn's does, within bounds.

        A request that asks for another protocol is answered as if it had not. The parser ends
        such a one at its headers, whatever body it has, so it is read again without the wish.
        """
        self._moved, size = False, len(data)
        while not self.deaf:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as asked:
                data = self._without_upgrade() + data[asked.args[0] :]
            except httptools.HttpParserError as error:
                self._fail_by(error)
            else:
                break
        self._framing = 0 if self._moved else self._framing + size
        if self._framing > HEADER_BYTES and not self.deaf:
            self._fail(431)

    def disconnect(self) -> None:
        """Nobody waits for the answers in hand any more."""
        for cycle in (self._answering, self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.waiting_for_100_continue = False
                cycle.message_event.set()
        self.pipeline.clear()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.received, self._head = HEAD, 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Those behind a body came too late for who reads the headers.
        if self.received == HEAD and not self.deaf:
            self._count(len(name) + len(value) + OVERHEAD_BYTES)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MOST_AHEAD:
            self.finish()
        if self.deaf:
            return
        if self.parser.get_method() == b"CONNECT":
            raise _NotTakenError(400, "CONNECT is for proxies")
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise _NotTakenError(400, f"HTTP/{version} is not spoken here")
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (not hosts and version == "1.1"):
            raise _NotTakenError(400, "there must be one Host header")
        if self.parser.should_upgrade():
            return  # read again, see `take`
        super().on_headers_complete()
        self.received, self._moved = BODY, True

    def on_body(self, body: bytes) -> None:
        if self.received != BODY:
            return
        super().on_body(body)
        self._moved = True
        if self.pipeline:
            self._ahead += len(body)
            if self._ahead > HIGH_WATER_LIMIT:
                raise _NotTakenError(400, "too much was sent ahead")

    def on_message_complete(self) -> None:
        if self.received == BODY:
            super().on_message_complete()
            self.received, self._moved = WHOLE, True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.pipeline:
            self._ahead = 0

    def finish(self) -> None:
        """Hear no more, and close when those in hand are answered."""
        self.deaf = True
        self.headers = []
        self.cycle.keep_alive = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > HEADER_BYTES:
            raise _NotTakenError(431)

    def _without_upgrade(self) -> bytes:
        kept = [b"%b: %b\r\n" % pair for pair in self.headers if pair[0] != b"upgrade"]
        version = self.parser.get_http_version().encode()
        line = b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, version)
        return line + b"".join(kept) + b"\r\n"

    def _fail_by(self, error: BaseException) -> None:
        cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
        self._fail(cause.status if isinstance(cause, _NotTakenError) else 400, str(cause or ""))

    def _fail(self, status: int, cause: str = "") -> None:
        """What is being received is no request: answer those before it, or it, and close."""
        broken = self.received == BODY
        if broken and self.pipeline:
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._answering
            broken = False
        if self.in_hand() and not broken:
            self.finish()
        else:
            self.refuse(status, cause)
