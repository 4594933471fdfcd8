"""Admission: how many requests, and how many bytes of them, a worker holds at once.

A bounded queue keeps the answer time of what is admitted bounded too; what does not fit is
refused at once, while refusing is still cheap, and told when to come back.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import anyio
from starlette.requests import ClientDisconnect, Request

from moon.serve.limits import Limits
from moon.serve.problem import Problem

__all__ = ["Admission", "Held", "Place"]


@dataclass
class Held:
    """How many bytes of one request's body and images are in memory."""

    bytes: int = 0


class Place:
    """One request's place among those that wait or are worked on, until it is left."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.taken = True
        admission.requests += 1

    def leave(self) -> None:
        """Make room for another; a second time it does nothing."""
        if self.taken:
            self.taken = False
            self._admission.requests -= 1


class Admission:
    """Counts what a worker holds; used from its event loop only."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests = 0
        self.bytes = 0

    def place(self) -> Place:
        """A place among the requests that wait or are worked on.

        Raises:
            Problem: 503, all are taken.
        """
        if self.requests >= self.limits.queue:
            raise self._overloaded()
        return Place(self)

    def check(self, place: Place | None, expected_seconds: float) -> None:
        """Refuse before reading a body that there is no place for.

        Args:
            place: that it has already.
            expected_seconds: how long it would wait.

        Raises:
            Problem: 503.
        """
        full = self.requests >= self.limits.queue and (place is None or not place.taken)
        if full or expected_seconds > self.limits.wait_seconds:
            raise self._overloaded(expected_seconds)

    def hold(self, held: Held, size: int) -> None:
        """Take memory for decoded images. Who holds all there is may have more.

        Raises:
            Problem: 503, there is none left.
        """
        if self.bytes > held.bytes and self.bytes + size > self.limits.buffered_bytes:
            raise self._overloaded()
        held.bytes += size
        self.bytes += size

    @contextmanager
    def memory(self) -> Iterator[Held]:
        """Gives back, at the end, the bytes that `read` and `hold` took."""
        held = Held()
        try:
            yield held
        finally:
            self.bytes -= held.bytes

    async def read(self, request: Request, held: Held) -> bytes:
        """Read a body no larger than allowed.

        Raises:
            Problem: 408 too slow, 413 too large, 503 no memory left for it, 400 for a
                client that left.
        """
        declared = request.headers.get("content-length", "")
        # An absurd number of digits must not reach int().
        if declared.isdecimal() and (len(declared) > 18 or self._too_large(int(declared))):
            raise self._large()
        chunks: list[bytes] = []
        try:
            with anyio.fail_after(self.limits.body_seconds):
                await self._collect(request, held, chunks)
        except TimeoutError as error:
            detail = f"The body did not arrive within {self.limits.body_seconds:g} s."
            raise Problem(408, "too-slow", detail, headers={"Connection": "close"}) from error
        except ClientDisconnect as error:
            raise Problem(400, "malformed", "The body ended early.") from error
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _collect(self, request: Request, held: Held, chunks: list[bytes]) -> None:
        stream: AsyncIterator[bytes] = request.stream()
        async for chunk in stream:
            if not chunk:
                continue
            if self._too_large(held.bytes + len(chunk)):
                raise self._large()
            if self.bytes + len(chunk) > self.limits.buffered_bytes:
                raise self._overloaded()
            held.bytes += len(chunk)
            self.bytes += len(chunk)
            chunks.append(chunk)

    def _too_large(self, size: int) -> bool:
        return size > self.limits.body_bytes

    def _large(self) -> Problem:
        mebibytes = self.limits.body_bytes / 2**20
        return Problem(413, "too-large", f"The body is larger than {mebibytes:g} MiB.")

    def _overloaded(self, expected_seconds: float = 0.0) -> Problem:
        wait = str(max(self.limits.retry_seconds, math.ceil(expected_seconds)))
        detail = f"The server has too many requests in hand; try again in {wait} s."
        return Problem(503, "overloaded", detail, headers={"Retry-After": wait})
