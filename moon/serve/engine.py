"""Engine: a Predictor behind an event loop, with everything slow on threads.

Reading (parsing a body, decoding its images) and deciding are two steps: a bad image fails
alone in the first and never reaches the second, which is the place to gather several
requests' images into one batch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from moon.errors import ImageError
from moon.gate import Decision
from moon.runtime.predictor import Predictor
from moon.serve.body import Encoded, Form, read_form
from moon.serve.problem import Problem
from moon.serve.schema import Item
from moon.serve.settings import Limits
from moon.serve.trail import Trail, current

__all__ = ["Deadline", "Engine"]

T = TypeVar("T")


@dataclass(frozen=True)
class Deadline:
    """The time by which a request must be answered."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        """Raises Problem 504 when the time is over."""
        if time.monotonic() - self.start > self.seconds:
            detail = f"No answer could be found within {self.seconds:g} s; send fewer images."
            raise Problem(504, "timeout", detail)


class Engine:
    """Reads and decides off the event loop.

    Args:
        predictor: thread-safe.
        threads: most requests read or decided at the same time.
        limits: of one request.

    Attributes:
        on_batch: told how many images are decided at once.
    """

    def __init__(self, predictor: Predictor, *, threads: int, limits: Limits) -> None:
        self.predictor = predictor
        self.on_batch: Callable[[int], None] = lambda images: None
        self.limits = limits
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="moon")

    def warm_up(self) -> None:
        """Make the first decision, which is slower than all others."""
        shape = self.predictor.bundle.preprocess.shape
        self.predictor.decide(np.zeros((1, *shape), np.uint8))

    async def read(self, form: Form, body: bytes, deadline: Deadline) -> list[Item]:
        """The images of a body, decoded.

        Raises:
            Problem: the body as a whole is wrong, or the time is over.
        """
        current().enter("decode")
        return await self._run(lambda: self._read(form, body, deadline))

    async def decide(self, items: Sequence[Item], deadline: Deadline) -> list[Decision]:
        """One decision for each item, all of which must have been read, in order.

        Raises:
            Problem: the time is over.
        """
        trail = current()
        trail.enter("queue")
        decisions = await self._run(lambda: self._decide(items, deadline, trail))
        trail.enter(None)
        return decisions

    def close(self) -> None:
        """Let running work end, and take no more."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _read(self, form: Form, body: bytes, deadline: Deadline) -> list[Item]:
        encoded = read_form(form, body, self.limits.items)
        return [self._decode(image, deadline) for image in encoded]

    def _decode(self, image: Encoded, deadline: Deadline) -> Item:
        deadline.check()
        if isinstance(image.data, ImageError):
            return Item(image.name, error=image.data)
        called = "the image" if image.name is None else f"image {image.name}"
        preprocess, most = self.predictor.bundle.preprocess, self.limits.pixels
        try:
            return Item(image.name, preprocess.pixels(image.data, max_pixels=most, name=called))
        except ImageError as error:
            return Item(image.name, error=error)

    def _decide(self, items: Sequence[Item], deadline: Deadline, trail: Trail) -> list[Decision]:
        deadline.check()
        trail.enter("inference")
        pixels = np.stack([item.pixels for item in items if item.pixels is not None])
        self.on_batch(len(pixels))
        return self.predictor.decide(pixels, [item.name for item in items])
