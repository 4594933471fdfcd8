"""Engine: a Predictor behind an event loop, with everything slow on threads.

Reading (parsing a body, decoding its images) and deciding are two steps: a bad image fails
alone in the first and never reaches the second, where the images of several requests meet.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from typing import TypeVar

import numpy as np

from moon.errors import ImageError, TooManyPixelsError
from moon.gate import Decision
from moon.runtime.predictor import Predictor
from moon.serve.batcher import Batcher, batch_sizes
from moon.serve.body import Encoded
from moon.serve.deadline import Deadline
from moon.serve.schema import Item
from moon.serve.settings import Limits
from moon.serve.trail import current

__all__ = ["Engine"]

T = TypeVar("T")
# An image file this small, of no more pixels, and a model's input this small take some 0.1 ms.
TINY_BYTES = 4096
TINY_PIXELS = 4096


class Engine:
    """Reads and decides off the event loop.

    Args:
        predictor: thread-safe.
        threads: images decoded at the same time, and batches decided at the same time.
        limits: of one request.
        on_batch: told how many images are decided at once.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        threads: int,
        limits: Limits,
        on_batch: Callable[[int], None] = lambda images: None,
    ) -> None:
        self.predictor = predictor
        self.limits = limits
        self.threads = threads
        most = min(limits.batch, predictor.largest_batch or limits.batch)
        self.batcher = Batcher(
            predictor.decide, sizes=batch_sizes(most), runners=threads, on_batch=on_batch
        )
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="moon-read")
        self._large = Lock()

    def warm_up(self) -> None:
        """Decide once in every size of batch: the first time is slower than all others."""
        self.batcher.warm_up(self.shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[H, W, C] of the pixels that the model takes."""
        return self.predictor.bundle.preprocess.shape

    @property
    def image_bytes(self) -> int:
        """Memory that one decoded image takes until it is decided."""
        return int(np.prod(self.shape))

    @property
    def stuck(self) -> bool:
        """Whether a batch has been running for longer than any request may take."""
        return self.batcher.busy_seconds > self.limits.answer_seconds

    async def parse(self, work: Callable[[], T]) -> T:
        """Run what reads a body on a thread, and raise what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def decode(self, images: Sequence[Encoded], deadline: Deadline) -> list[Item]:
        """The images decoded, each by itself, in order.

        Raises:
            Problem: 504, found between two images; who waits must look at the time too.
        """
        current().enter("decode")
        if len(images) == 1 and (item := self._decode_tiny(images[0])) is not None:
            return [item]
        loop, found = asyncio.get_running_loop(), list[Item]()
        # No more at once than there are threads, so that other requests get their turn.
        running: deque[asyncio.Future[Item]] = deque()
        try:
            for image in images:
                if len(running) == self.threads:
                    found.append(await running.popleft())
                    deadline.check()
                running.append(loop.run_in_executor(self._pool, self._decode, image))
            while running:
                found.append(await running.popleft())
        finally:
            for one in running:
                one.cancel()
        return found

    async def decide(self, items: Sequence[Item], deadline: Deadline) -> list[Decision]:
        """One decision for each item, all of which must have been read, in order.

        Raises:
            Problem: 504.
        """
        pixels = [item.pixels for item in items if item.pixels is not None]
        trail = current()
        trail.enter("queue")
        decisions = await self.batcher.decide(
            pixels, deadline, started=lambda: trail.enter("inference")
        )
        trail.enter(None)
        return [
            replace(decision, input=item.name)
            for decision, item in zip(decisions, items, strict=True)
        ]

    def close(self) -> None:
        """Let running work end, and take no more."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.batcher.close()

    def _decode_tiny(self, image: Encoded) -> Item | None:
        """An image that takes no longer than handing it to a thread would; None for others."""
        if self.image_bytes > TINY_BYTES:
            return None
        if isinstance(image.data, bytes) and not _is_tiny(image.data):
            return None
        item = self._read(image, min(TINY_PIXELS, self.limits.pixels))
        return None if isinstance(item.error, TooManyPixelsError) else item

    def _decode(self, image: Encoded) -> Item:
        light = min(self.limits.light_pixels, self.limits.pixels)
        item = self._read(image, light)
        if light < self.limits.pixels and isinstance(item.error, TooManyPixelsError):
            # A file of 90 KB may take 200 MB decoded: one such at a time, whatever the threads.
            with self._large:
                return self._read(image, self.limits.pixels)
        return item

    def _read(self, image: Encoded, most: int) -> Item:
        """An image of no more pixels than that, or why there is none."""
        if isinstance(image.data, ImageError):
            return Item(image.name, error=image.data)
        called = "the image" if image.name is None else f"image {image.name}"
        preprocess = self.predictor.bundle.preprocess
        try:
            return Item(image.name, preprocess.pixels(image.data, max_pixels=most, name=called))
        except ImageError as error:
            return Item(image.name, error=error)


def _is_tiny(data: bytes) -> bool:
    """JPEG, or PNG without anything that unpacks to more than its pixels."""
    if len(data) > TINY_BYTES or not data.startswith((b"\xff\xd8", b"\x89PNG")):
        return False
    return not any(chunk in data for chunk in (b"zTXt", b"iTXt", b"iCCP"))
