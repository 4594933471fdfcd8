"""Supervisor: starts the worker processes, replaces those that die, and stops them all.

uvicorn's own, rather than the one behind ``bentoml serve``: that one listens on a second
port of the loopback, where any user of the machine may tell it which commands to run, and
on SIGTERM stops listening before anyone was told to go elsewhere.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from socket import socket

from uvicorn.config import Config
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from moon.serve.address import BACKLOG
from moon.serve.connection import Connection
from moon.serve.logs import configuration as log_configuration
from moon.serve.settings import Settings
from moon.serve.worker import Worker, WorkerApp

__all__ = ["Supervisor", "configuration"]

PING_SECONDS = 0.5
LONGEST_PAUSE = 30.0
logger = logging.getLogger("moon.serve")


class Supervisor(Multiprocess):
    """Keeps the workers of one listening socket running.

    Args:
        config: of each worker.
        sockets: which they share.
        announce: called once, when every worker answers.

    Attributes:
        failed: whether a worker died before all of them answered once; that ends `run`.
    """

    def __init__(self, config: Config, sockets: list[socket], announce: Callable[[], None]) -> None:
        super().__init__(config, sockets)
        self.failed = False
        self._announce: Callable[[], None] | None = announce
        self._graves: dict[int, Grave] = {}

    def init_processes(self) -> None:
        for _ in range(self.processes_num):
            self.processes.append(Worker(self.config, self.sockets))
            self.processes[-1].start()

    def keep_subprocess_alive(self) -> None:
        # The base class kills what does not answer its ping within seconds; loading a
        # large model on a slow core may take longer.
        for index, process in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            if not process.process.is_alive():
                self._replace(index, process)
        if self._announce and all(process.is_ready(PING_SECONDS) for process in self.processes):
            self._announce()
            self._announce = None

    def _replace(self, index: int, dead: Process) -> None:
        if self._announce is not None:
            self.failed = True
            self.should_exit.set()
            return
        now, grave = time.monotonic(), self._graves.get(index, Grave())
        if grave.pid != dead.pid:
            logger.warning("worker %s died (exit code %s)", dead.pid, dead.exitcode)
            grave = grave.another(dead.pid, now)
            self._graves[index] = grave
        if now >= grave.until:
            self.processes[index] = Worker(self.config, self.sockets)
            self.processes[index].start()
            logger.warning("worker %s takes its place", self.processes[index].pid)

    def handle_hup(self) -> None:
        """Nothing: uvicorn would put workers of its own in the place of ours."""

    handle_ttin = handle_ttou = handle_hup

    def terminate_all(self) -> None:
        # The workers still listen through their own copies; once they stop, nobody must be
        # left to accept connections that no one will answer.
        for listener in self.sockets:
            listener.close()
        super().terminate_all()


@dataclass(frozen=True)
class Grave:
    """The last death in a worker's place: one that keeps dying is replaced ever less often.

    Attributes:
        pid: of the dead worker.
        time: of its death.
        deaths: in a row, each soon after the one before.
        until: when the next may start.
    """

    pid: int | None = None
    time: float = -math.inf
    deaths: int = 0
    until: float = 0.0

    def another(self, pid: int | None, now: float) -> Grave:
        """The grave of the next worker to die in this place."""
        deaths = self.deaths + 1 if now - self.time < 2 * LONGEST_PAUSE else 1
        pause = 0.0 if deaths == 1 else min(2.0 ** (deaths - 2), LONGEST_PAUSE)
        return Grave(pid, now, deaths, now + pause)


def configuration(settings: Settings, workers: int) -> Config:
    """How uvicorn runs a worker: no access log, no web sockets, no trusted proxies."""
    return Config(
        WorkerApp(settings),
        factory=True,
        workers=workers,
        http=partial(Connection, limits=settings.limits),  # type: ignore[arg-type]
        timeout_keep_alive=math.ceil(settings.limits.idle_seconds),
        backlog=BACKLOG,
        ws="none",
        access_log=False,
        log_config=log_configuration(settings.log_format, requests=settings.log_requests),
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=settings.finish_seconds,
    )
