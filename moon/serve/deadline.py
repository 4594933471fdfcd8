"""Deadline: the time by which a request must be answered, or is given up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

from moon.serve.problem import Problem

__all__ = ["Deadline"]

T = TypeVar("T")


@dataclass
class Deadline:
    """When a request's time is over.

    Attributes:
        seconds: from its start.
        given_up: nobody waits for the answer any more, whatever the time.
    """

    seconds: float
    start: float = field(default_factory=time.monotonic)
    given_up: bool = False

    @property
    def over(self) -> bool:
        """Whether work on the request would be in vain."""
        return self.given_up or self.left <= 0

    @property
    def left(self) -> float:
        """Seconds left, negative afterwards."""
        return self.start + self.seconds - time.monotonic()

    def check(self) -> None:
        """Raises Problem 504 when the time is over."""
        if self.over:
            raise self.problem()

    async def within(self, work: Awaitable[T]) -> T:
        """Wait for work, which is cancelled when the time is over.

        Raises:
            Problem: 504.
        """
        try:
            return await asyncio.wait_for(work, max(self.left, 0))
        except asyncio.TimeoutError as error:
            raise self.problem() from error

    def problem(self) -> Problem:
        """What is answered then."""
        detail = f"No answer could be found within {self.seconds:g} s; send fewer images."
        return Problem(504, "timeout", detail)
