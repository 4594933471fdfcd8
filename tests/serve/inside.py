"""A listening server in this process, so that a test can look at its connections."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
from functools import partial
from types import TracebackType
from typing import Any

from uvicorn.config import Config

from moon.serve.connection import Connection
from moon.serve.limits import Limits
from moon.serve.worker import Listening
from tests.serve.conftest import until

__all__ = ["Inside", "rest"]


class Inside:
    """Serves an ASGI application on a thread while it is entered.

    Attributes:
        server: uvicorn's.
    """

    def __init__(self, app: Any, **limits: float) -> None:
        granted = Limits(**limits)  # type: ignore[arg-type]
        config = Config(
            app,
            http=partial(Connection, limits=granted),  # type: ignore[arg-type]
            timeout_keep_alive=math.ceil(granted.idle_seconds),
            timeout_graceful_shutdown=10,
            lifespan="off",
            log_config=None,
            ws="none",
            access_log=False,
        )
        self.server = Listening(config)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._address = self._listener.getsockname()
        self._loop = (config.get_loop_factory() or asyncio.new_event_loop)()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self.server.serve([self._listener]))
        finally:
            self._loop.close()

    def __enter__(self) -> Inside:
        self._thread.start()
        until(lambda: self.server.started)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def connect(self, buffer: int | None = None) -> socket.socket:
        """A client, with so small a buffer for what it does not read."""
        client = socket.socket()
        if buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client.settimeout(20)
        client.connect(self._address)
        return client

    def only(self) -> Connection:
        """The connection there is."""
        until(lambda: len(self.server.server_state.connections) == 1)
        (found,) = self.server.server_state.connections
        assert isinstance(found, Connection)
        return found


def rest(client: socket.socket) -> bytes:
    """All that comes until the end."""
    found = b""
    while chunk := client.recv(65536):
        found += chunk
    return found
