"""Execution contexts for several threads: each has one to itself while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moon.errors import BackendError
from moon.runtime.trt.lane import Lane

__all__ = ["Pool"]


class Pool:
    """Lanes, made as they are needed, up to a number; who finds none free waits for one.

    A lane on which something failed is closed and not used again.

    Args:
        make: makes a lane.
        most: lanes at once.
    """

    def __init__(self, make: Callable[[], Lane], most: int) -> None:
        self._make, self._most = make, most
        self._free: list[Lane] = []
        self._count = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def count(self) -> int:
        """Lanes there are."""
        return self._count

    @contextmanager
    def lane(self, rows: int) -> Iterator[Lane]:
        """A lane for this thread alone, rather one that last ran as many rows.

        Raises:
            BackendError: the pool was closed, or no lane can be made.
        """
        lane = self._take(rows)
        try:
            yield lane
        except BaseException:
            # What is on its stream may still be under way, and its graph half captured.
            self._drop(lane)
            raise
        with self._changed:
            kept = not self._closed
            if kept:
                self._free.append(lane)
                self._changed.notify_all()
        if not kept:
            self._drop(lane)

    def close(self, seconds: float = 10.0) -> None:
        """Let nobody in any more, wait for who is within, and close every lane that is free."""
        last = time.monotonic() + seconds
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._count > len(self._free) and (left := last - time.monotonic()) > 0:
                self._changed.wait(left)
            free, self._free = self._free, []
            self._count -= len(free)
        for lane in free:
            lane.close()

    def _take(self, rows: int) -> Lane:
        while True:
            with self._changed:
                lane = self._waited(rows)
                if lane is not None:
                    return lane
                self._count += 1
            try:
                return self._make()
            except BackendError:
                if not self._fewer():
                    raise
            except BaseException:
                self._gone()
                raise

    def _waited(self, rows: int) -> Lane | None:
        """A free lane, or None when another may be made."""
        while not self._closed:
            if self._free:
                fits = (i for i, lane in enumerate(self._free) if lane.rows == rows)
                return self._free.pop(next(fits, -1))
            if self._count < self._most:
                return None
            self._changed.wait()
        raise BackendError("the engine was closed", remedy="Open the model again")

    def _fewer(self) -> bool:
        """No more lanes can be had, mostly for want of memory: do with those that there are."""
        self._gone()
        with self._changed:
            if self._count:
                self._most = self._count
            return self._count > 0

    def _drop(self, lane: Lane) -> None:
        try:
            lane.close()
        finally:
            self._gone()

    def _gone(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()
