"""Worker: one process of the service, and how it stops listening."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from dataclasses import dataclass

from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE
from uvicorn.server import Server
from uvicorn.supervisors.multiprocess import Process

from moon.errors import MoonError
from moon.serve.settings import Settings

__all__ = ["Worker", "WorkerApp"]

# Files that a worker has open beside its connections.
SPARE_FILES = 256
# For clients that wait in the socket's queue when it is about to be closed.
EMPTYING_SECONDS = 0.2
TAKEN_IN_A_TURN = 32
logger = logging.getLogger("moon.serve")


class Worker(Process):
    """uvicorn's worker process with our `Listening`."""

    @property
    def server(self) -> Server:
        if self._server is None:
            self._server = Listening(config=self.config)
        return self._server


class Listening(Server):
    """uvicorn's server, which takes clients in as they come and throws none of them out."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # uvloop takes one client of a socket in a turn of its loop. Of a hundred that come at
        # once to a busy worker the last would wait a hundred turns, of some milliseconds each.
        for one in sockets or []:
            # A copy of a socket sets the mode of all of them, also those of other workers, which
            # would wait for a client where another was quicker.
            one.setblocking(False)
        listeners = [one.dup() for one in sockets or [] for _ in range(TAKEN_IN_A_TURN - 1)]
        await super().startup([*(sockets or []), *listeners])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Closing a listening socket resets the connections that wait in it. With no room in
        # its queue new clients wait outside, and those inside are still taken. The socket is
        # shared by all workers: one that takes the place of a worker that left alone listens
        # anew, with a queue.
        for listener in sockets or []:
            with contextlib.suppress(OSError):
                listener.listen(0)
        await asyncio.sleep(EMPTYING_SECONDS)
        await super().shutdown(sockets)


@dataclass(frozen=True)
class WorkerApp:
    """Makes a worker's application; sent to the worker, which calls it."""

    settings: Settings

    def __call__(self) -> ASGIApp:
        from moon.serve.reload import open_served
        from moon.serve.service import asgi_app

        settings = self.settings
        allow_files(settings.limits.connections + SPARE_FILES)
        try:
            predictors = {one.name: open_served(one, settings) for one in settings.served}
        except MoonError as error:
            logger.error("%s", error)
            sys.exit(STARTUP_FAILURE)
        return asgi_app(predictors, settings)


def allow_files(wanted: int) -> None:
    """Raise the number of files this process may have open, as far as the system lets it."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
