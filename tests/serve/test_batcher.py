"""Batches: when they form, whom they serve, and what a failure in one does to the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.errors import BackendError
from moon.gate import Decision
from moon.serve.batcher import Batcher, batch_sizes
from moon.serve.deadline import Deadline
from moon.serve.problem import Problem

Pixels = np.ndarray[Any, Any]
POISON = 255


class Model:
    """Tells images apart by their one pixel, and fails at one of them; can be held up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()
        self.lock = threading.Lock()

    def decide(self, pixels: Pixels) -> list[Decision]:
        values = [int(value) for value in pixels[:, 0, 0, 0]]
        with self.lock:
            self.batches.append(values)
        assert self.go.wait(20)
        if POISON in values:
            raise BackendError("this one cannot be computed")
        return [decision(value) for value in values]


def decision(value: int) -> Decision:
    return Decision(
        accepted=True, label=str(value), reason=None, top=(), score_name="ebo", score=float(value),
        threshold=0.0, p_value=None,
    )  # fmt: skip


def images(*values: int) -> list[Pixels]:
    return [np.full((1, 1, 1), value, np.uint8) for value in values]


def labels(decisions: list[Decision]) -> list[str | None]:
    return [one.label for one in decisions]


def run(
    model: Model, wanted: Callable[[Batcher], Awaitable[Any]], most: int = 16, runners: int = 1
) -> Any:
    batcher = Batcher(model.decide, sizes=batch_sizes(most), runners=runners)

    async def talk() -> Any:
        return await wanted(batcher)

    try:
        return asyncio.run(talk())
    finally:
        model.go.set()
        batcher.close()


async def queued(batcher: Batcher, count: int) -> None:
    while batcher.queued != count:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 3)), (4, (1, 4)), (16, (1, 4, 16)), (20, (1, 4, 16, 20))],
)
def test_sizes_are_few(most: int, sizes: tuple[int, ...]) -> None:
    assert batch_sizes(most) == sizes


def test_an_idle_runner_waits_for_nobody() -> None:
    model = Model()

    async def wanted(batcher: Batcher) -> None:
        for value in range(3):
            assert labels(await batcher.decide(images(value), Deadline(20))) == [str(value)]

    run(model, wanted)
    assert model.batches == [[0], [1], [2]]


def test_what_queued_meanwhile_is_decided_together() -> None:
    model = Model()
    model.go.clear()

    async def wanted(batcher: Batcher) -> None:
        asked = [
            asyncio.create_task(batcher.decide(images(value), Deadline(20))) for value in range(6)
        ]
        await queued(batcher, 5)
        model.go.set()
        answers = await asyncio.gather(*asked)
        assert [labels(found) for found in answers] == [[str(value)] for value in range(6)]

    run(model, wanted)
    assert model.batches == [[0], [1, 2, 3, 4], [5]]


def test_requests_take_turns() -> None:
    model = Model()
    model.go.clear()

    async def wanted(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.decide(images(100), Deadline(20)))
        await asyncio.sleep(0)
        many = asyncio.create_task(batcher.decide(images(*range(12)), Deadline(20)))
        few = asyncio.create_task(batcher.decide(images(50, 51), Deadline(20)))
        await queued(batcher, 14)
        model.go.set()
        assert labels(await few) == ["50", "51"]
        assert labels(await many) == [str(value) for value in range(12)]
        await first

    run(model, wanted, most=4)
    assert model.batches[1] == [0, 50, 1, 51]


def test_an_image_that_fails_fails_alone() -> None:
    model = Model()
    model.go.clear()

    async def wanted(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.decide(images(9), Deadline(20)))
        await asyncio.sleep(0)
        asked = [
            asyncio.create_task(batcher.decide(images(value), Deadline(20)))
            for value in (1, POISON, 2, 3)
        ]
        await queued(batcher, 4)
        model.go.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [labels(found[i]) for i in (0, 2, 3)] == [["1"], ["2"], ["3"]]
        assert isinstance(found[1], BackendError)
        await first
        assert labels(await batcher.decide(images(4), Deadline(20))) == ["4"]

    run(model, wanted)
    assert model.batches[1] == [1, POISON, 2, 3]


def test_the_backends_largest_batch_is_kept() -> None:
    model = Model()
    model.go.clear()

    async def wanted(batcher: Batcher) -> None:
        asked = asyncio.create_task(batcher.decide(images(*range(20)), Deadline(20)))
        await queued(batcher, 17)
        model.go.set()
        assert labels(await asked) == [str(value) for value in range(20)]

    run(model, wanted, most=3)
    assert {len(batch) for batch in model.batches} <= {1, 3}


def test_what_is_too_late_is_not_decided() -> None:
    model = Model()
    model.go.clear()

    async def wanted(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.decide(images(1), Deadline(20)))
        await asyncio.sleep(0)
        with pytest.raises(Problem) as caught:
            await batcher.decide(images(2), Deadline(0.05))
        assert caught.value.status == 504
        assert batcher.queued == 0
        model.go.set()
        await first

    run(model, wanted)
    assert model.batches == [[1]]


def test_what_was_cancelled_is_not_decided() -> None:
    model = Model()
    model.go.clear()

    async def wanted(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.decide(images(1), Deadline(20)))
        left = asyncio.create_task(batcher.decide(images(2), Deadline(20)))
        stays = asyncio.create_task(batcher.decide(images(3), Deadline(20)))
        await queued(batcher, 2)
        left.cancel()
        # Cancelled while it is decided: nobody is harmed.
        first.cancel()
        await asyncio.sleep(0.01)
        assert batcher.queued == 1
        # What nobody waits for takes no memory either.
        assert [len(job.pixels) for job in batcher._jobs] == [0, 1]
        model.go.set()
        assert labels(await stays) == ["3"]
        assert batcher.busy_seconds == 0

    run(model, wanted)
    assert model.batches == [[1], [3]]


def test_the_wait_is_foretold() -> None:
    model = Model()

    async def wanted(batcher: Batcher) -> None:
        batcher.warm_up((1, 1, 1))
        batcher._pace = 0.5
        model.go.clear()
        asked = asyncio.create_task(batcher.decide(images(*range(9)), Deadline(20)))
        await queued(batcher, 1)
        assert batcher.expected_seconds == pytest.approx(0.25)
        await asyncio.sleep(0.01)
        assert batcher.busy_seconds > 0
        model.go.set()
        await asked

    # Two runners take four each.
    run(model, wanted, most=4, runners=2)
    assert {len(batch) for batch in model.batches} == {1, 4}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 3), st.integers(1, 6))
def test_everyone_gets_their_own_answers(counts: list[int], runners: int, most: int) -> None:
    model = Model()
    starts = np.cumsum([0, *counts])

    async def wanted(batcher: Batcher) -> None:
        groups = [range(start, start + n) for start, n in zip(starts, counts, strict=False)]
        asked = [batcher.decide(images(*group), Deadline(20)) for group in groups]
        answers = await asyncio.gather(*asked)
        assert [labels(found) for found in answers] == [list(map(str, group)) for group in groups]

    run(model, wanted, most=most, runners=runners)
    decided = [value for batch in model.batches for value in batch]
    assert sorted(decided) == list(range(sum(counts)))
