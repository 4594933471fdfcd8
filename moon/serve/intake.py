"""Intake: the way of a request from its headers to decisions, the same on every route.

A place is looked for before the body is read, memory before images are decoded; everything
then runs against one deadline, and stops when the client leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from starlette.requests import Request

from moon.gate import Decision
from moon.serve.admission import Admission, Held
from moon.serve.body import Encoded
from moon.serve.deadline import Deadline
from moon.serve.engine import Engine
from moon.serve.problem import Problem
from moon.serve.schema import Item, readable

__all__ = ["Intake", "Taken"]

T = TypeVar("T")
P = TypeVar("P")


@dataclass(frozen=True)
class Taken(Generic[P]):
    """A request's images and what was decided of them.

    Attributes:
        asked: what the parser found beside the images.
        items: all of them, in order.
        decisions: one for each of those that could be read, in order.
    """

    asked: P
    items: list[Item]
    decisions: list[Decision]


class Intake:
    """Takes requests in.

    Args:
        admission: of the worker.
    """

    def __init__(self, admission: Admission) -> None:
        self.admission = admission

    async def take(
        self,
        request: Request,
        engine: Engine,
        parse: Callable[[bytes], tuple[P, list[Encoded]]],
        *,
        quick: bool = False,
    ) -> Taken[P]:
        """Decide the images of a request.

        Args:
            request: its body not read yet.
            engine: decides.
            parse: what it asks for, and its images; raises Problem.
            quick: whether ``parse`` takes no time worth a thread.

        Raises:
            Problem: 400 nothing could be read, 408, 413, 422, 503, 504, or what ``parse`` raises.
        """
        self.admission.check(engine.batcher.expected_seconds)
        with self.admission.memory() as held:
            body = await self.admission.read(request, held)
            with self.admission.slot():
                deadline = Deadline(engine.limits.answer_seconds)
                work = self._work(engine, partial(parse, body), held, deadline, quick)
                return await _while_connected(request, deadline, work)

    async def _work(
        self,
        engine: Engine,
        parse: Callable[[], tuple[P, list[Encoded]]],
        held: Held,
        deadline: Deadline,
        quick: bool,
    ) -> Taken[P]:
        asked, images = parse() if quick else await engine.parse(parse)
        self.admission.hold(held, len(images) * engine.image_bytes)
        items = await engine.decode(images, deadline)
        decisions = await engine.decide(readable(items), deadline)
        return Taken(asked, items, decisions)


async def _while_connected(request: Request, deadline: Deadline, work: Awaitable[T]) -> T:
    """What the work returns, unless the client leaves, or its time is over, before it is done.

    One timer for all of the work: each more of them is a task, and time of every request.
    """
    working = asyncio.ensure_future(work)
    # After the body nothing comes but the end of the connection.
    leaving = asyncio.ensure_future(request.receive())
    # Work that is cancelled may still fail, and nobody asks how.
    working.add_done_callback(lambda done: done.cancelled() or done.exception())
    both: Sequence[asyncio.Future[object]] = (working, leaving)  # type: ignore[assignment]
    try:
        left = max(deadline.left, 0)
        await asyncio.wait(both, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if not leaving.done():
            raise deadline.problem()
        raise Problem(400, "client-left", "The client left before it was answered.")
    finally:
        deadline.given_up = not working.done()
        for one in both:
            one.cancel()
