"""Trail: what happened to one request, for its log line, its trace and the histograms.

It travels in a context variable, so that what decodes or decides says where a request is
without being handed anything. Nothing of an image, no name of one and no token gets in.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock

from moon.gate import Decision

__all__ = ["STAGES", "Span", "Trail", "current", "follow"]

STAGES = ("decode", "queue", "inference")
Moved = Callable[[str | None, str | None], None]


@dataclass(frozen=True)
class Span:
    """A time that a request spent in one stage.

    Attributes:
        stage: one of `STAGES`.
        start, end: nanoseconds since the epoch.
    """

    stage: str
    start: int
    end: int

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9


class Trail:
    """Where a request is, and what became of its images.

    Args:
        moved: told the stage left and the stage entered, None for none.

    Attributes:
        spans: stages that are over, in order.
        decided: images by decision: "accepted", or the reason of an abstention.
        unreadable: images that were not decided.
    """

    def __init__(self, moved: Moved = lambda left, entered: None) -> None:
        self.spans: list[Span] = []
        self.decided: Counter[str] = Counter()
        self.unreadable = 0
        self._moved = moved
        self._stage: str | None = None
        self._since = 0
        self._over = False
        # Stages may begin on the thread that runs them.
        self._lock = Lock()

    def enter(self, stage: str | None) -> None:
        """Leave the present stage for another, or for none; nothing once the request is over."""
        now = time.time_ns()
        with self._lock:
            if self._over or stage == self._stage:
                return
            if self._stage is not None:
                self.spans.append(Span(self._stage, self._since, now))
            self._moved(self._stage, stage)
            self._stage, self._since = stage, now

    def count(self, decisions: Iterable[Decision], unreadable: int) -> None:
        """Note what became of the images."""
        for decision in decisions:
            self.decided["accepted" if decision.accepted else decision.reason or "ood"] += 1
        self.unreadable += unreadable

    def close(self) -> None:
        """The request is over."""
        self.enter(None)
        with self._lock:
            self._over = True


_CURRENT: ContextVar[Trail] = ContextVar("moon_trail")


def current() -> Trail:
    """The trail of the request being answered; outside of one, one that nobody reads."""
    return _CURRENT.get(None) or Trail()


@contextmanager
def follow(moved: Moved) -> Iterator[Trail]:
    """A trail for the request that is answered within."""
    trail = Trail(moved)
    token = _CURRENT.set(trail)
    try:
        yield trail
    finally:
        trail.close()
        _CURRENT.reset(token)
