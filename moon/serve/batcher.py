"""Batcher: images of several requests decided together, without anyone waiting for company.

An image that comes while a runner is idle is decided at once, alone. While all runners are
busy images queue, and what has queued when one becomes idle goes into its next batch: the
busier the service, the larger its batches. Requests take turns, image by image, so that one
with many images does not hold up those with one. Batches have only a few sizes, since
backends prepare for each size they meet.

All of it runs on one event loop, but for the deciding, which runs on threads.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moon.gate import Decision
from moon.serve.deadline import Deadline

__all__ = ["Batcher", "batch_sizes"]

Pixels = npt.NDArray[np.uint8]
Decide = Callable[[Pixels], list[Decision]]
Outcome = Decision | Exception

# How much of the newest measurement the running mean takes in.
_NEWEST = 0.2


def batch_sizes(most: int) -> tuple[int, ...]:
    """The sizes of batches up to ``most``: the powers of four below it, and itself."""
    sizes = [1]
    while 4 * sizes[-1] < most:
        sizes.append(4 * sizes[-1])
    return tuple(sizes) if most <= sizes[-1] else (*sizes, most)


@dataclass(eq=False)
class _Job:
    """One request's images."""

    pixels: Sequence[Pixels]
    done: asyncio.Future[list[Decision]]
    found: list[Outcome | None]
    started: Callable[[], None]
    taken: int = 0
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = len(self.pixels)

    @property
    def left(self) -> int:
        """Images that wait for a runner."""
        return len(self.pixels) - self.taken

    def settle(self, index: int, outcome: Outcome) -> None:
        self.found[index] = outcome
        self.missing -= 1
        if self.missing or self.done.done():
            return
        failures = [one for one in self.found if isinstance(one, Exception)]
        if failures:
            self.done.set_exception(failures[0])
        else:
            self.done.set_result([one for one in self.found if isinstance(one, Decision)])


_Place = tuple[_Job, int]


class Batcher:
    """Decides images in batches, on threads of its own.

    Args:
        decide: a decision for each image, uint8 [N, H, W, C]; thread-safe.
        sizes: the numbers N to use, ascending from 1.
        runners: batches decided at the same time.
        on_batch: told how many images are decided at once.

    Attributes:
        queued: images that wait for a runner.
    """

    def __init__(
        self,
        decide: Decide,
        *,
        sizes: Sequence[int],
        runners: int,
        on_batch: Callable[[int], None] = lambda images: None,
    ) -> None:
        self.sizes = tuple(sizes)
        self.queued = 0
        self._on_batch = on_batch
        self._decide = decide
        self._runners = self._idle = runners
        self._pool = ThreadPoolExecutor(runners, thread_name_prefix="moon-run")
        self._jobs: deque[_Job] = deque()
        self._running: dict[int, float] = {}
        self._batches = 0
        self._pace = 0.0

    async def decide(
        self,
        pixels: Sequence[Pixels],
        deadline: Deadline,
        started: Callable[[], None] = lambda: None,
    ) -> list[Decision]:
        """A decision for each image of a request, in order.

        Cancelling it takes its images out of the queue.

        Args:
            pixels: uint8 [H, W, C] each, of the model's shape.
            deadline: images still queued then are never decided.
            started: called when the first of them leaves the queue.

        Raises:
            Problem: 504, the deadline has passed.
            MoonError: the backend failed at one of these images.
        """
        if not pixels:
            return []
        done: asyncio.Future[list[Decision]] = asyncio.get_running_loop().create_future()
        job = _Job(pixels, done, [None] * len(pixels), started)
        self._jobs.append(job)
        self.queued += job.left
        self._start()
        try:
            return await deadline.within(done)
        finally:
            # Of one that was given up: `_gather` finds none of its images left.
            self.queued -= job.left
            job.pixels, job.taken = (), 0

    @property
    def expected_seconds(self) -> float:
        """How long an image that comes now would wait for a runner, by what was measured."""
        return self.queued * self._pace / self._runners

    @property
    def busy_seconds(self) -> float:
        """For how long the batch has been running that has run longest, 0 for none."""
        now = time.monotonic()
        return max((now - start for start in self._running.values()), default=0.0)

    def warm_up(self, shape: tuple[int, int, int]) -> None:
        """Decide once in every size, and then measure one image of shape [H, W, C]."""
        for size in (*self.sizes, 1):
            start = time.monotonic()
            self._decide(np.zeros((size, *shape), np.uint8))
        self._pace = time.monotonic() - start

    def close(self) -> None:
        """Let running batches end, and start no more."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> None:
        while self._idle:
            places = self._gather()
            if not places:
                return
            self._idle -= 1
            self._batches += 1
            number, self._running[self._batches] = self._batches, time.monotonic()
            self._on_batch(len(places))
            work = self._pool.submit(self._run, [job.pixels[i] for job, i in places])
            running = asyncio.wrap_future(work)
            running.add_done_callback(
                lambda ran, number=number, places=places: self._finish(ran, number, places)  # type: ignore[misc]
            )

    def _gather(self) -> list[_Place]:
        """The images of the next batch, one of each request in turn."""
        size = max((size for size in self.sizes if size <= self.queued), default=0)
        places: list[_Place] = []
        while len(places) < size:
            job = self._jobs.popleft()
            if not job.left:
                continue
            if not job.taken:
                job.started()
            places.append((job, job.taken))
            job.taken += 1
            if job.left:
                self._jobs.append(job)
        self.queued -= size
        return places

    def _run(self, pixels: list[Pixels]) -> list[Outcome]:
        """Outcomes of a batch; where it fails, of each image alone."""
        try:
            return list(self._decide(np.stack(pixels)))
        except Exception as error:
            if len(pixels) == 1:
                return [error]
        return [self._run([one])[0] for one in pixels]

    def _finish(
        self, ran: asyncio.Future[list[Outcome]], number: int, places: list[_Place]
    ) -> None:
        seconds = time.monotonic() - self._running.pop(number)
        self._idle += 1
        if ran.cancelled():  # closed before it began
            return
        each = seconds / len(places)
        self._pace = each if not self._pace else self._pace + _NEWEST * (each - self._pace)
        for (job, index), outcome in zip(places, ran.result(), strict=True):
            job.settle(index, outcome)
        self._start()
