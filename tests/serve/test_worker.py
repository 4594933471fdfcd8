"""How a worker takes clients in."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack

import pytest
from uvicorn.config import Config

from moon.serve.worker import Listening

CLIENTS = 80


def test_many_who_come_at_once_are_taken_in_few_turns() -> None:
    uvloop = pytest.importorskip("uvloop")
    turns = 0

    async def run(listener: socket.socket, stack: ExitStack) -> None:
        nonlocal turns
        config = Config(lambda: None, lifespan="off", log_config=None)
        config.load()
        server = Listening(config)
        server.lifespan = config.lifespan_class(config)
        await server.startup([listener])
        for _ in range(CLIENTS):  # in the socket's queue, since the loop does not turn
            stack.enter_context(socket.create_connection(listener.getsockname()))
        while len(server.server_state.connections) < CLIENTS and turns < 2 * CLIENTS:
            turns += 1
            await asyncio.sleep(0)
        for connection in list(server.server_state.connections):
            connection.transport.close()
        await server.shutdown([listener])
        with pytest.raises(OSError):
            socket.create_connection(listener.getsockname())

    loop = uvloop.new_event_loop()
    try:
        with socket.create_server(("127.0.0.1", 0), backlog=256) as listener, ExitStack() as stack:
            loop.run_until_complete(run(listener, stack))
    finally:
        loop.close()
    assert turns <= CLIENTS / 4
