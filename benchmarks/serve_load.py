"""Load on an HTTP server over loopback: one client, several, or requests at given times.

One event loop and raw bytes, so that on a core of its own the load is not the limit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvloop

__all__ = ["Outcome", "closed", "open_loop", "request"]

# Connections at most of an open loop; a request that finds none waits here, and its time runs.
MOST_CONNECTIONS = 512
PATIENCE = 60.0


@dataclass
class Outcome:
    """What came of requests.

    Attributes:
        answered: seconds of those answered by 200.
        refused: seconds of those answered by 503.
        failed: other statuses and broken connections, how often each.
        seconds: that all took.
        late: of an open loop, seconds after its time that a request was sent, the 99th percentile.
    """

    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    late: float = 0.0

    def add(self, status: str, seconds: float) -> None:
        if status == "200":
            self.answered.append(seconds)
        elif status == "503":
            self.refused.append(seconds)
        else:
            self.failed[status] = self.failed.get(status, 0) + 1

    @property
    def rate(self) -> float:
        """Answers of 200 a second."""
        return len(self.answered) / self.seconds

    def percentile(self, percent: float, refused: bool = False) -> float:
        """Milliseconds; NaN of none."""
        times = self.refused if refused else self.answered
        return float(np.percentile(times, percent)) * 1e3 if times else float("nan")


def request(body: bytes, kind: str, path: str = "/predict") -> bytes:
    """A whole POST request."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def closed(port: int, payload: bytes, clients: int, *, seconds: float) -> Outcome:
    """Clients that each ask again when they were answered."""
    return _run(_closed(port, payload, clients, seconds))


def open_loop(port: int, payload: bytes, rate: float, *, seconds: float, seed: int = 0) -> Outcome:
    """Requests at the times of a Poisson process, however many are under way.

    Times count from when a request was due, so that a server that stalls is not spared those it
    kept away.
    """
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds * 1.5) + 10)
    due = np.cumsum(gaps)
    return _run(_open(port, payload, due[due < seconds].tolist(), seconds))


def _run(work: Coroutine[Any, Any, Outcome]) -> Outcome:
    loop = uvloop.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


class _Connection(asyncio.Protocol):
    """A kept connection with one request under way."""

    def __init__(self) -> None:
        self.open = False
        self._answer = b""
        self._done: asyncio.Future[str] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport, self.open = transport, True

    def ask(self, payload: bytes) -> asyncio.Future[str]:
        """The status."""
        self._answer = b""
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(payload)
        return self._done

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, found, body = self._answer.partition(b"\r\n\r\n")
        if not found or self._done is None or self._done.done():
            return
        lines = head.lower().split(b"\r\n")
        length = next((int(x[15:]) for x in lines if x.startswith(b"content-length:")), 0)
        if len(body) < length:
            return
        if b"connection: close" in lines:
            self.open = False
            self.transport.close()
        self._done.set_result(lines[0].split(b" ")[1].decode())

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self._done is not None and not self._done.done():
            self._done.set_result("connection closed")


async def _connect(port: int) -> _Connection:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(_Connection, "127.0.0.1", port)
    return connection


async def _closed(port: int, payload: bytes, clients: int, seconds: float) -> Outcome:
    outcome = Outcome()
    start = time.perf_counter()
    end = start + seconds

    async def client() -> None:
        connection = await _connect(port)
        while (begun := time.perf_counter()) < end:
            if not connection.open:
                connection = await _connect(port)
            status = await asyncio.wait_for(connection.ask(payload), PATIENCE)
            outcome.add(status, time.perf_counter() - begun)
        connection.transport.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    outcome.seconds = time.perf_counter() - start
    return outcome


async def _open(port: int, payload: bytes, due: list[float], seconds: float) -> Outcome:
    outcome, idle, late = Outcome(), [], []  # type: tuple[Outcome, list[_Connection], list[float]]
    room = asyncio.Semaphore(MOST_CONNECTIONS)
    start = time.perf_counter()

    async def one(at: float) -> None:
        async with room:
            late.append(time.perf_counter() - start - at)
            try:
                connection = idle.pop() if idle else await _connect(port)
                if not connection.open:
                    connection = await _connect(port)
                status = await asyncio.wait_for(connection.ask(payload), PATIENCE)
            except (OSError, asyncio.TimeoutError) as error:
                status = type(error).__name__
            else:
                if connection.open:
                    idle.append(connection)
            outcome.add(status, time.perf_counter() - start - at)

    running = []
    for at in due:
        if (pause := at - (time.perf_counter() - start)) > 0:
            await asyncio.sleep(pause)
        running.append(asyncio.ensure_future(one(at)))
    await asyncio.gather(*running)
    outcome.seconds = max(seconds, time.perf_counter() - start)
    outcome.late = float(np.percentile(late, 99)) if late else 0.0
    for connection in idle:
        connection.transport.close()
    return outcome
