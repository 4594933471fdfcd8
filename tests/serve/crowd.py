"""Clients that ask without a pause while a test does something to the service."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import httpx

__all__ = ["crowd"]

PAUSE = 0.003


@contextmanager
def crowd(
    connect: Callable[[], httpx.Client],
    ask: Callable[[httpx.Client], Hashable],
    *,
    clients: int,
    asks: int = 5,
) -> Iterator[Counter[Hashable]]:
    """How often which answer came.

    Args:
        connect: a new client.
        ask: asks once; what counts of the answer. What it raises counts as its text.
        clients: that ask at the same time.
        asks: of one connection; with few, every worker is asked.
    """
    answers: Counter[Hashable] = Counter()
    enough, lock = threading.Event(), threading.Lock()

    def run() -> None:
        while not enough.is_set():
            with connect() as client:
                for _ in range(asks):
                    try:
                        answer = ask(client)
                    except Exception as error:
                        answer = repr(error)
                    with lock:
                        answers[answer] += 1
                    time.sleep(PAUSE)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        enough.set()
        for thread in threads:
            thread.join()
