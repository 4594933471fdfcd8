"""The driver: one native call runs a whole network, on several threads with a barrier a step.

A barrier is a counter that only grows. Who waits spins for a while and then gives its core away
between looks, so that more threads than cores do not stall each other. Between runs threads look
for work for some microseconds and then sleep in a semaphore.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llvmlite import ir

from moon.runtime.sparse.frames import Layout
from moon.runtime.sparse.ir import I32, I64, PTR, VOID, Fn

__all__ = ["DRIVER", "OPERATION", "SYNC"]

# A step: a kernel, its record, and whether all threads meet after it.
OPERATION = Layout("kernel", "record", "meet")
# arrived: at barriers, all threads counted, since the beginning; alone in its cache line.
# base: of it when a run starts. looks: at a barrier, or for work, before giving way.
# times: where thread 0 notes the time before the first step and after each one, or 0; a timespec
# each, from clock.
SYNC = Layout(
    "arrived", *(f"_{i}" for i in range(7)),
    "operations", "count", "threads", "base", "stop", "looks", "semaphores", "semaphore_step",
    "give_way", "wait", "try_wait", "post", "clock", "times",
)  # fmt: skip

_KERNEL = ir.FunctionType(VOID, [PTR, I64, I64])
_PLAIN = ir.FunctionType(I32, [])
_ON_SEMAPHORE = ir.FunctionType(I32, [PTR])
_CLOCK = ir.FunctionType(I32, [I32, PTR])
_MONOTONIC = 1
TIMESPEC_BYTES = 16


def _build_run(module: ir.Module) -> Any:
    """``run``(sync, thread): this thread's share of every step; seen by its module alone."""
    k = Fn(module, "run", [(PTR, "sync"), (I64, "thread")])
    sync = k.arguments["sync"]
    operations = k.load(PTR, sync, SYNC["operations"], 8)
    threads = _read(k, "threads")
    goal = k.variable(I64, _read(k, "base"))
    times = k.load(PTR, sync, SYNC["times"], 8)
    timed = k.compare(k.b.ptrtoint(times, I64), "!=", 0)
    timed = k.b.and_(timed, k.compare(k.arguments["thread"], "==", 0))
    _note(k, timed, times, k.number(0))
    with k.loop(0, _read(k, "count")) as n:
        one = k.at(operations, k.mul(n, OPERATION.bytes))
        kernel = k.load(PTR, one, OPERATION["kernel"], 8)
        record = k.load(PTR, one, OPERATION["record"], 8)
        k.call(kernel, _KERNEL, [record, k.arguments["thread"], threads])
        several = k.compare(threads, ">", 1)
        meet = k.compare(k.load(I64, one, OPERATION["meet"], 8), "!=", 0)
        with k.when(k.b.and_(several, meet)):
            goal.set(k.add(goal.get(), threads))
            _barrier(k, goal.get())
        _note(k, timed, times, k.add(n, 1))
    k.done()
    run = module.globals["run"]
    run.linkage = "internal"
    return run


def _build_lead(module: ir.Module) -> None:
    """``lead``(sync): wake the others and take part in one run as thread 0.

    One native call, so that nothing can come between waking threads and meeting them.
    """
    run = _build_run(module)
    k = Fn(module, "lead", [(PTR, "sync")])
    sync = k.arguments["sync"]
    # All threads passed the last meeting of the run before, so that nobody counts now.
    k.store(k.load(I64, sync, SYNC["arrived"], 8), sync, SYNC["base"], 8)
    post = k.load(PTR, sync, SYNC["post"], 8)
    with k.loop(1, _read(k, "threads")) as thread:
        k.call(post, _ON_SEMAPHORE, [_semaphore(k, thread)])
    k.b.call(run, [sync, k.number(0)])
    k.done()


def _build_work(module: ir.Module) -> None:
    """``work``(sync, thread): take part in run after run until told to stop."""
    run = _build_run(module)
    k = Fn(module, "work", [(PTR, "sync"), (I64, "thread")])
    sync, thread = k.arguments["sync"], k.arguments["thread"]
    semaphore = _semaphore(k, thread)
    with k.forever() as leave:
        _wait_for_work(k, semaphore)
        with k.when(k.compare(k.look(k.at(sync, SYNC["stop"])), "!=", 0)):
            leave()
        k.b.call(run, [sync, thread])
    k.done()


# Function -> what writes it into a module.
DRIVER: Mapping[str, Callable[[ir.Module], None]] = {"lead": _build_lead, "work": _build_work}


def _semaphore(k: Fn, thread: Any) -> Any:
    semaphores = k.load(PTR, k.arguments["sync"], SYNC["semaphores"], 8)
    return k.at(semaphores, k.mul(thread, _read(k, "semaphore_step")))


def _read(k: Fn, name: str) -> Any:
    return k.load(I64, k.arguments["sync"], SYNC[name], 8)


def _note(k: Fn, timed: Any, times: Any, number: Any) -> None:
    with k.when(timed):
        clock = k.load(PTR, k.arguments["sync"], SYNC["clock"], 8)
        where = k.at(times, k.mul(number, TIMESPEC_BYTES))
        k.call(clock, _CLOCK, [ir.Constant(I32, _MONOTONIC), where])


def _barrier(k: Fn, goal: Any) -> None:
    sync = k.arguments["sync"]
    arrived = k.at(sync, SYNC["arrived"])
    k.count(arrived)
    looks = k.variable(I64, k.number(0))
    with k.forever() as leave:
        with k.when(k.compare(k.look(arrived), ">=", goal)):
            leave()
        looks.set(k.add(looks.get(), 1))
        k.pause()
        with k.when(k.compare(looks.get(), ">", _read(k, "looks"))):
            k.call(k.load(PTR, sync, SYNC["give_way"], 8), _PLAIN, [])


def _wait_for_work(k: Fn, semaphore: Any) -> None:
    """Take the semaphore: look for a while, then sleep. A signal may end the sleep too early."""
    sync = k.arguments["sync"]
    try_wait = k.load(PTR, sync, SYNC["try_wait"], 8)
    wait = k.load(PTR, sync, SYNC["wait"], 8)
    looks = k.variable(I64, k.number(0))
    with k.forever() as leave:
        with k.when(k.succeeded(k.call(try_wait, _ON_SEMAPHORE, [semaphore]))):
            leave()
        looks.set(k.add(looks.get(), 1))
        k.pause()
        with k.when(k.compare(looks.get(), ">", _read(k, "looks"))):
            taken = k.call(wait, _ON_SEMAPHORE, [semaphore])
            with k.when(k.succeeded(taken)):
                leave()
