"""Parts decided on this machine, by a few threads at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from moon.runtime.offline.worker import Worker

__all__ = ["decide"]


def decide(worker: Worker, parts: Sequence[int], threads: int) -> Iterator[int]:
    """Decide parts, at most ``threads`` at a time.

    Yields:
        The number of each when it is done.
    """
    waiting = iter(parts)
    running: dict[Future[None], int] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="moon-score") as pool:
        try:
            while True:
                for number in waiting:
                    running[pool.submit(worker.part, number)] = number
                    if len(running) == threads:
                        break
                if not running:
                    return
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    future.result()
                    yield running.pop(future)
        finally:
            for future in running:
                future.cancel()
