"""Calls of native code that are under way as the interpreter ends.

A daemon thread that comes back from C++ to an interpreter that is no more is unwound through
frames that cannot be, and the whole process is aborted. So the end waits for it.
"""

from __future__ import annotations

import atexit
import os
import threading
import time

__all__ = ["UNDER_WAY", "UnderWay"]

# The end does not wait for longer.
_MOST_SECONDS = 10.0


class UnderWay:
    """Counts the threads that are within; entered by ``with``.

    The main thread is not counted: it is the one that waits.
    """

    def __init__(self) -> None:
        self._ending = False
        self.reset()

    def reset(self) -> None:
        """In a child that was forked there are no other threads."""
        self._lock, self._count = threading.Lock(), 0

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            return
        with self._lock:
            if self._ending:
                raise SystemExit  # as the interpreter itself is about to do with this thread
            self._count += 1

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            return
        with self._lock:
            self._count -= 1

    def end(self) -> None:
        """Let no other thread in any more, and wait for those within."""
        with self._lock:
            self._ending = True
        last = time.monotonic() + _MOST_SECONDS
        while self._count and time.monotonic() < last:
            time.sleep(0.001)


UNDER_WAY = UnderWay()
atexit.register(UNDER_WAY.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=UNDER_WAY.reset)
