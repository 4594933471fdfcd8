"""Threads that run programs together: asleep in native code between runs, without the GIL."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError
from moon.runtime.sparse.frames import Record, address
from moon.runtime.sparse.kernels_driver import OPERATION, PROGRESS, SYNC
from moon.runtime.sparse.memory import aligned

__all__ = ["Team"]

_LEAD = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p
)
_WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
# Looks before giving way: some tens of microseconds. And before sleeping: longer than a caller in
# Python takes from one run to the next, since waking up takes as long.
_LOOKS, _IDLE_LOOKS = 2000, 8000
_SEMAPHORE_BYTES = 128


class Team:
    """The caller's thread and ``threads - 1`` more.

    One program at a time: the caller sees to that. A process that was forked starts its own.

    Args:
        threads: 1 or more.
        lead, work: addresses of the driver's functions.

    Raises:
        BackendError: the system gives no threads or semaphores.
    """

    def __init__(self, threads: int, lead: int, work: int) -> None:
        if threads < 1:
            raise ValueError(f"a team of {threads} threads")
        self.threads = threads
        self._lead, self._work = _LEAD(lead), _WORK(work)
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._shared = _Shared(self.threads)
        # Of all the team only what is shared is given to threads: they do not keep a team alive.
        self._finalizer = weakref.finalize(self, self._shared.stop)
        # As the interpreter ends others may still be running, and who sleeps ends with the process.
        self._finalizer.atexit = False
        try:
            for thread in range(1, self.threads):
                threading.Thread(
                    target=_serve,
                    args=(self._work, self._shared, thread),
                    name=f"moon-engine-{thread}",
                    daemon=True,
                ).start()
        except RuntimeError as error:
            self.close()
            raise BackendError(f"{self.threads} threads cannot be started: {error}") from error

    def run(
        self,
        operations: NDArray[np.int64],
        times: NDArray[np.int64] | None = None,
        owner: object = None,
    ) -> None:
        """Run a table of operations.

        Args:
            operations: int64 [n, 3], see :data:`moon.runtime.sparse.kernels_driver.OPERATION`;
                the last one is a meeting.
            times: int64 [n + 1, 2], gets seconds and nanoseconds of a steady clock, before the
                first operation and after each one.
            owner: of all that operations point to; kept until no thread looks at it.

        Raises:
            ValueError: it is no such table.
            BackendError: the team is closed.
        """
        fields = len(OPERATION.fields)
        if operations.dtype != np.int64 or operations.shape[1:] != (fields,):
            raise ValueError("no table of operations")
        if not len(operations):
            return
        if not operations[-1, OPERATION["meet"] // 8]:
            raise ValueError("threads do not meet in the end")
        if not self._finalizer.alive:
            raise BackendError("the engine is closed")
        if self._pid != os.getpid():
            self._finalizer.detach()
            self._start()
        if times is not None and times.shape != (len(operations) + 1, 2):
            raise ValueError("no table of times")
        shared = self._shared
        if self.threads > 1 and len(shared.progress) < len(operations) * PROGRESS.bytes:
            shared.progress = aligned(len(operations) * PROGRESS.bytes)
        about = (operations, times, shared.progress, owner)
        shared.about.append(about)
        self._lead(
            shared.address,
            address(operations),
            len(operations),
            address(shared.progress),
            0 if times is None else address(times),
        )
        # It waited for all threads to be done with what was before.
        shared.about[:] = [about]

    def close(self) -> None:
        """Let the threads end. There is no run after that."""
        self._finalizer()


class _Shared:
    """What threads meet over. It lives for as long as one of them does."""

    def __init__(self, threads: int) -> None:
        self._pid = os.getpid()
        self.progress = np.zeros(0, np.uint8)
        # What threads that are late may still be looking at.
        self.about: list[Any] = []
        self._memory = aligned(SYNC.bytes).view(np.int64)
        self._semaphores = aligned(_SEMAPHORE_BYTES * threads)
        self._library = library = ctypes.CDLL(None, use_errno=True)
        first = address(self._semaphores)
        self._addresses = [first + _SEMAPHORE_BYTES * i for i in range(1, threads)]
        for where in self._addresses:
            if library.sem_init(ctypes.c_void_p(where), 0, 0):
                reason = os.strerror(ctypes.get_errno())
                raise BackendError(f"a semaphore cannot be made: {reason}", remedy="Use one thread")
        values: dict[str, Any] = dict.fromkeys(SYNC.fields, 0)
        values |= {
            "threads": threads,
            "looks": _LOOKS,
            "idle_looks": _IDLE_LOOKS,
            "semaphores": first,
            "semaphore_step": _SEMAPHORE_BYTES,
            "give_way": _function(library.sched_yield),
            "wait": _function(library.sem_wait),
            "try_wait": _function(library.sem_trywait),
            "post": _function(library.sem_post),
            "clock": _function(library.clock_gettime),
        }
        self._memory[:] = Record(SYNC, values).data
        self.address = address(self._memory)

    def set(self, name: str, value: int) -> None:
        """A field."""
        self._memory[SYNC[name] // 8] = value

    def stop(self) -> None:
        """Tell threads to end, in the process that started them."""
        if self._pid == os.getpid():
            self.set("stop", 1)
            for where in self._addresses:
                self._library.sem_post(ctypes.c_void_p(where))


def _function(pointer: Any) -> int:
    found = ctypes.cast(pointer, ctypes.c_void_p).value
    if not found:
        raise BackendError("the C library lacks a function that the engine needs")
    return found


def _serve(work: Any, shared: _Shared, thread: int) -> None:
    work(shared.address, thread)
