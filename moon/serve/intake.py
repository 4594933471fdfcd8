"""Intake: the way of a request from its headers to decisions, the same on every route.

A place is looked for before the body is read, memory before images are decoded; everything
then runs against one deadline, and stops when the client leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import anyio
from starlette.requests import Request
from starlette.types import Message

from moon.gate import Decision
from moon.serve.admission import Admission, Held, Place
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
        # Who received the request may have kept a place for it.
        place: Place | None = request.scope["state"].get("place")
        self.admission.check(place, engine.batcher.expected_seconds)
        with self.admission.memory() as held:
            body = await self.admission.read(request, held)
            if place is None or not place.taken:
                place = self.admission.place()
            try:
                deadline = Deadline(engine.limits.answer_seconds)
                work = self._work(engine, partial(parse, body), held, deadline, quick)
                return await _while_connected(request, deadline, work)
            finally:
                place.leave()

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
    """What the work returns, unless the client leaves, or its time is over, before it is done."""
    # After the body nothing comes but the end of the connection.
    leaving = asyncio.ensure_future(request.receive())
    with anyio.move_on_after(max(deadline.left, 0)) as scope:

        def left(ended: asyncio.Future[Message]) -> None:
            if not ended.cancelled():
                scope.cancel()

        leaving.add_done_callback(left)
        try:
            return await work
        finally:
            leaving.remove_done_callback(left)
            deadline.given_up = True
            leaving.cancel()
    if leaving.done() and not leaving.cancelled():
        raise Problem(400, "client-left", "The client left before it was answered.")
    raise deadline.problem()
