"""Lifecycle: whether a worker is ready, and how it leaves without losing a request."""

from __future__ import annotations

import asyncio
import os
import signal
from types import FrameType

from moon.serve.problem import Problem

__all__ = ["Lifecycle"]

PARENT_CHECK_SECONDS = 1.0


class Lifecycle:
    """Ready from `start` until SIGTERM, then draining.

    While draining /readyz says 503 and answers ask clients to close their connection, but
    every request is still taken; after the grace period the server's own handler of the
    signal stops listening and finishes what is in flight.
    """

    def __init__(self) -> None:
        self.ready = False
        self.draining = False
        self._watch: asyncio.Task[None] | None = None

    def start(self, *, grace_seconds: float, parent: int | None) -> None:
        """Begin serving; called on the event loop, after the server took the signals."""
        loop = asyncio.get_running_loop()
        previous = signal.getsignal(signal.SIGTERM)

        def stop(number: int, frame: FrameType | None) -> None:
            if not self.draining and callable(previous):
                self.draining = True
                loop.call_soon_threadsafe(loop.call_later, grace_seconds, previous, number, frame)

        # Nothing to delay where the server left the signal's default, which is to die.
        if callable(previous):
            signal.signal(signal.SIGTERM, stop)
        if parent is not None:
            self._watch = asyncio.create_task(_outlive(parent))
        self.ready = True

    def stop(self) -> None:
        """The server has finished."""
        self.ready = False
        if self._watch is not None:
            self._watch.cancel()

    def check(self, working: bool) -> None:
        """What /readyz tells.

        Args:
            working: whether what answers requests does.

        Raises:
            Problem: 503 while starting, while leaving, and when nothing works.
        """
        if self.draining:
            state = "is stopping"
        elif not self.ready:
            state = "is not ready yet"
        elif not working:
            state = "does not get on: a batch takes longer than any request may"
        else:
            return
        raise Problem(503, "not-ready", f"The server {state}.", headers={"Retry-After": "1"})


async def _outlive(parent: int) -> None:
    # A supervisor that was killed cannot stop its workers, which would keep the port.
    while os.getppid() == parent:
        await asyncio.sleep(PARENT_CHECK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
