"""Threads that run programs together."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from llvmlite import ir
from numpy.typing import NDArray

from moon.errors import BackendError
from moon.runtime.sparse.frames import Layout, Record
from moon.runtime.sparse.ir import I64
from moon.runtime.sparse.jit import Jit
from moon.runtime.sparse.kernel import Kernel
from moon.runtime.sparse.kernels_driver import DRIVER, OPERATION, SYNC
from moon.runtime.sparse.team import Team

MIX = Layout("source", "target", "count")
COUNT = 1000


def build_mix(module: ir.Module) -> None:
    """target[i] = 3 source[i] + source[count - 1 - i] + 1: a share needs all shares before."""
    one = Kernel(module, "test_mix", MIX)
    k, f = one.k, one.f
    begin, end = one.mine(f["count"])
    with k.loop(begin, end) as i:
        other = k.sub(k.sub(f["count"], 1), i)
        near = k.load(I64, f["source"], k.shifted(i, 3), 8)
        far = k.load(I64, f["source"], k.shifted(other, 3), 8)
        k.store(k.add(k.add(k.mul(near, 3), far), 1), f["target"], k.shifted(i, 3), 8)
    k.done()


class Work:
    """A chain of steps to and fro between two arrays."""

    def __init__(self, jit: Jit, steps: int = 9) -> None:
        self.a, self.b = np.arange(COUNT), np.zeros(COUNT, np.int64)
        kernel = jit.address("test_mix", build_mix)
        ends = [(self.a, self.b), (self.b, self.a)]
        self.records = [
            Record(MIX, {"source": s, "target": t, "count": COUNT})
            for s, t in (ends[i % 2] for i in range(steps))
        ]
        rows = [{"kernel": kernel, "record": r.address, "meet": 1} for r in self.records]
        self.table = OPERATION.table(rows)
        self.steps = steps

    def result(self, team: Team) -> NDArray[np.int64]:
        self.a[:] = np.arange(COUNT)
        team.run(self.table)
        return (self.b if self.steps % 2 else self.a).copy()

    def expected(self) -> NDArray[np.int64]:
        x = np.arange(COUNT)
        for _ in range(self.steps):
            x = 3 * x + x[::-1] + 1
        return x


@pytest.fixture
def teams(jit: Jit) -> Iterator[Callable[[int], Team]]:
    made = []

    def make(threads: int) -> Team:
        found = jit.addresses(DRIVER)
        made.append(Team(threads, found["lead"], found["work"]))
        return made[-1]

    yield make
    for team in made:
        team.close()


def own_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("moon-engine")]


def wait_until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_many_runs_in_a_row(jit: Jit, teams: Any, threads: int) -> None:
    team, work = teams(threads), Work(jit)
    expected = work.expected()
    for _ in range(200):
        assert np.array_equal(work.result(team), expected)


def test_runs_of_different_length_on_one_team(jit: Jit, teams: Any) -> None:
    team = teams(2)
    works = [Work(jit, steps) for steps in (1, 2, 7, 30)]
    for i in range(200):
        work = works[i * 7 % 4]
        assert np.array_equal(work.result(team), work.expected())
    team.run(np.zeros((0, 3), np.int64))


def test_a_table_that_does_not_end_in_a_meeting_is_refused(jit: Jit, teams: Any) -> None:
    team, work = teams(2), Work(jit)
    table = work.table.copy()
    table[-1, 2] = 0
    for wrong in (table, work.table.astype(np.int32), work.table[:, :2]):
        with pytest.raises(ValueError, match=r"table|meet"):
            team.run(wrong)
    assert np.array_equal(work.result(team), work.expected())


def test_threads_of_python_take_turns(jit: Jit, teams: Any) -> None:
    team, lock, wrong = teams(2), threading.Lock(), []

    def call() -> None:
        work = Work(jit)
        for _ in range(50):
            with lock:
                if not np.array_equal(work.result(team), work.expected()):
                    wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_two_teams_at_a_time(jit: Jit, teams: Any) -> None:
    pairs, wrong = [(teams(2), Work(jit)) for _ in range(2)], []

    def call(team: Team, work: Work) -> None:
        for _ in range(50):
            if not np.array_equal(work.result(team), work.expected()):
                wrong.append(1)

    callers = [threading.Thread(target=call, args=pair) for pair in pairs]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_that_was_forked_has_threads_of_its_own(jit: Jit, teams: Any) -> None:
    team, work = teams(2), Work(jit)
    work.result(team)
    child = os.fork()
    if not child:
        right = all(np.array_equal(work.result(team), work.expected()) for _ in range(20))
        team.close()
        os._exit(0 if right else 1)
    end = time.monotonic() + 20
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < end:
        time.sleep(0.01)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done and status == 0
    assert np.array_equal(work.result(team), work.expected())


def test_nobody_waits_for_threads_that_do_not_wake_up(jit: Jit, teams: Any) -> None:
    team, work = teams(4), Work(jit)
    shared = team._shared
    shared.set("post", int(shared._memory[SYNC["give_way"] // 8]))  # which wakes nobody
    for _ in range(20):
        assert np.array_equal(work.result(team), work.expected())


def test_threads_that_are_late_find_nothing_to_do(jit: Jit, teams: Any) -> None:
    team, works = teams(3), [Work(jit, steps) for steps in (40, 1)]
    shared = team._shared
    post = int(shared._memory[SYNC["post"] // 8])
    for i in range(300):
        work = works[i % 2]
        # Woken every third time alone: they come with what runs before have left them.
        shared.set("post", post if i % 3 else int(shared._memory[SYNC["give_way"] // 8]))
        assert np.array_equal(work.result(team), work.expected())
    assert len(shared.about) == 1


def test_idle_threads_take_no_time(jit: Jit, teams: Any) -> None:
    team, work = teams(3), Work(jit)
    work.result(team)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - before < 0.02


def test_close_ends_the_threads(jit: Jit, teams: Any) -> None:
    assert wait_until(lambda: not own_threads())
    team, work = teams(3), Work(jit)
    work.result(team)
    assert len(own_threads()) == 2
    team.close()
    assert wait_until(lambda: not own_threads())
    with pytest.raises(BackendError, match="closed"):
        team.run(work.table)
    team.close()


def test_a_team_that_nobody_has_ends_its_threads(jit: Jit) -> None:
    found = jit.addresses(DRIVER)
    for _ in range(20):
        team = Team(3, found["lead"], found["work"])
        Work(jit).result(team)
        del team
    gc.collect()
    assert wait_until(lambda: not own_threads())


def test_twenty_thousand_runs_take_no_more_memory(jit: Jit, teams: Any) -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not os.path.exists("/proc/self/statm"):  # noqa: PTH110
        pytest.skip("no /proc")
    team, work = teams(1), Work(jit, 1)
    for _ in range(1000):
        team.run(work.table)
    before = resident()
    for _ in range(20_000):
        team.run(work.table)
    assert resident() - before < 2 << 20


def test_an_interrupt_between_runs_leaves_the_team_whole(jit: Jit, teams: Any) -> None:
    """An exception thrown into the caller at any moment must not leave others waiting."""
    team, work, stop = teams(2), Work(jit), threading.Event()
    caught = []

    def call() -> None:
        while not stop.is_set():
            try:
                for _ in range(10_000):
                    team.run(work.table)
                    if stop.is_set():
                        break
            except KeyboardInterrupt:
                caught.append(1)

    caller = threading.Thread(target=call)
    caller.start()
    throw = ctypes.pythonapi.PyThreadState_SetAsyncExc
    for _ in range(50):
        time.sleep(0.002)
        throw(ctypes.c_ulong(caller.ident or 0), ctypes.py_object(KeyboardInterrupt))
        count = len(caught)
        if not wait_until(lambda count=count: len(caught) > count):  # type: ignore[misc]
            break
    stop.set()
    caller.join(10)
    assert not caller.is_alive() and len(caught) >= 49
    assert np.array_equal(work.result(team), work.expected())


def test_no_threads_are_no_team(jit: Jit) -> None:
    found = jit.addresses(DRIVER)
    with pytest.raises(ValueError, match="0 threads"):
        Team(0, found["lead"], found["work"])
