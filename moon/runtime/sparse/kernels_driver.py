"""The driver: one native call runs a whole network, on several threads that share every step.

A step is cut into as many shares as there are threads. Whoever is there takes the next share, and
nobody goes on behind a meeting before all shares up to it are done. So a thread that the system
lets wait holds the others up only while it is in the middle of a share; one that has not even
woken up is not missed.

Who waits spins for a while and then gives its core away between looks. Between runs threads look
for work for some microseconds and then sleep in a semaphore.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llvmlite import ir

from moon.runtime.sparse.frames import Layout
from moon.runtime.sparse.ir import I32, I64, PTR, VOID, Fn

__all__ = ["DRIVER", "OPERATION", "PROGRESS", "SYNC"]

# A step: a kernel, its record, and whether all threads meet after it.
OPERATION = Layout("kernel", "record", "meet")
# Of a step: shares that were taken, or asked for in vain, and shares that are done. A cache line.
PROGRESS = Layout("taken", "done", *(f"_{i}" for i in range(6)))
# inside: threads beside the first that may read what a run is about; alone in its cache line.
# active: whether there is a run. looks: before giving way; idle_looks: for work, before sleeping.
# times: where the first thread notes the time before the first step and after each one, or 0; a
# timespec each, from clock.
SYNC = Layout(
    "inside", *(f"_{i}" for i in range(7)),
    "operations", "count", "progress", "times", "active", "threads", "stop", "looks",
    "idle_looks", "semaphores", "semaphore_step", "give_way", "wait", "try_wait", "post", "clock",
)  # fmt: skip

_KERNEL = ir.FunctionType(VOID, [PTR, I64, I64])
_PLAIN = ir.FunctionType(I32, [])
_ON_SEMAPHORE = ir.FunctionType(I32, [PTR])
_CLOCK = ir.FunctionType(I32, [I32, PTR])
_MONOTONIC = 1
TIMESPEC_BYTES = 16


def _build_run(module: ir.Module) -> Any:
    """``run``(sync, thread): take part in every step; seen by its module alone."""
    k = Fn(module, "run", [(PTR, "sync"), (I64, "thread")])
    sync = k.arguments["sync"]
    operations, progress, times = (
        k.load(PTR, sync, SYNC[name], 8) for name in ("operations", "progress", "times")
    )
    threads = _read(k, "threads")
    timed = k.compare(k.b.ptrtoint(times, I64), "!=", 0)
    timed = k.b.and_(timed, k.compare(k.arguments["thread"], "==", 0))
    _note(k, timed, times, k.number(0))
    # The steps behind the last meeting.
    since = k.variable(I64, k.number(0))
    with k.loop(0, _read(k, "count")) as n:
        one = k.at(operations, k.mul(n, OPERATION.bytes))
        kernel = k.load(PTR, one, OPERATION["kernel"], 8)
        record = k.load(PTR, one, OPERATION["record"], 8)
        several = k.compare(threads, ">", 1)
        with k.when(k.b.not_(several)):
            k.call(kernel, _KERNEL, [record, k.number(0), k.number(1)])
        with k.when(several):
            mine = k.at(progress, k.mul(n, PROGRESS.bytes))
            with k.forever() as leave:
                share = k.count(k.at(mine, PROGRESS["taken"]))
                with k.when(k.compare(share, ">=", threads)):
                    leave()
                k.call(kernel, _KERNEL, [record, share, threads])
                k.count(k.at(mine, PROGRESS["done"]))
            meet = k.compare(k.load(I64, one, OPERATION["meet"], 8), "!=", 0)
            with k.when(meet):
                with k.loop(since.get(), k.add(n, 1)) as m:
                    done = k.at(k.at(progress, k.mul(m, PROGRESS.bytes)), PROGRESS["done"])
                    _until(k, done, ">=", threads)
                since.set(k.add(n, 1))
        _note(k, timed, times, k.add(n, 1))
    k.done()
    run = module.globals["run"]
    run.linkage = "internal"
    return run


def _build_lead(module: ir.Module) -> None:
    """``lead``(sync, operations, count, progress, times): a run, as its first thread.

    One native call, so that nothing can come between waking threads and meeting them.
    """
    run = _build_run(module)
    about = [(PTR, "operations"), (I64, "count"), (PTR, "progress"), (PTR, "times")]
    k = Fn(module, "lead", [(PTR, "sync"), *about])
    sync = k.arguments["sync"]
    # Whoever is late may still be looking at what the last run was about.
    _until(k, k.at(sync, SYNC["inside"]), "==", k.number(0))
    for _, name in about:
        k.store(k.arguments[name], sync, SYNC[name], 8)
    with k.when(k.compare(_read(k, "threads"), ">", 1)):
        with k.loop(0, k.arguments["count"]) as n:
            for name in ("taken", "done"):
                one = k.at(k.arguments["progress"], k.mul(n, PROGRESS.bytes))
                k.store(k.number(0), one, PROGRESS[name], 8)
        k.tell(k.number(1), k.at(sync, SYNC["active"]))
        post = k.load(PTR, sync, SYNC["post"], 8)
        with k.loop(1, _read(k, "threads")) as thread:
            k.call(post, _ON_SEMAPHORE, [_semaphore(k, thread)])
    k.b.call(run, [sync, k.number(0)])
    k.tell(k.number(0), k.at(sync, SYNC["active"]))
    k.done()


def _build_work(module: ir.Module) -> None:
    """``work``(sync, thread): take part in run after run until told to stop."""
    run = _build_run(module)
    k = Fn(module, "work", [(PTR, "sync"), (I64, "thread")])
    sync, thread = k.arguments["sync"], k.arguments["thread"]
    semaphore = _semaphore(k, thread)
    inside = k.at(sync, SYNC["inside"])
    with k.forever() as leave:
        _wait_for_work(k, semaphore)
        with k.when(k.compare(k.look(k.at(sync, SYNC["stop"])), "!=", 0)):
            leave()
        # First to be seen, then to look: so the next run waits, or this thread sees none.
        k.count(inside, "seq_cst")
        with k.when(k.compare(k.look(k.at(sync, SYNC["active"]), "seq_cst"), "!=", 0)):
            k.b.call(run, [sync, thread])
        k.count(inside, "seq_cst", down=True)
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


def _until(k: Fn, pointer: Any, how: str, value: Any) -> None:
    """Look until what others write compares so."""
    looks = k.variable(I64, k.number(0))
    with k.forever() as leave:
        with k.when(k.compare(k.look(pointer, "seq_cst"), how, value)):
            leave()
        looks.set(k.add(looks.get(), 1))
        k.pause()
        with k.when(k.compare(looks.get(), ">", _read(k, "looks"))):
            give_way = k.load(PTR, k.arguments["sync"], SYNC["give_way"], 8)
            k.call(give_way, _PLAIN, [])


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
        with k.when(k.compare(looks.get(), ">", _read(k, "idle_looks"))):
            taken = k.call(wait, _ON_SEMAPHORE, [semaphore])
            with k.when(k.succeeded(taken)):
                leave()
