"""Engines used by several threads, across forks, with signals, and as the interpreter ends."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from moon.errors import BackendError
from moon.runtime import SparseEngine

from .graphs import Graph, engaged, opened
from .scripts import network, script, started


def own_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("moon-engine")]


def wait_until_no_threads() -> bool:
    end = time.monotonic() + 10
    while own_threads() and time.monotonic() < end:
        time.sleep(0.005)
    return not own_threads()


def test_many_engines_and_many_callers_at_once() -> None:
    data, x = network()
    engines = [engaged(data, threads=1 + i % 3) for i in range(8)]
    expected = [engines[0].run(x[: n + 1]) for n in range(5)]
    wrong: list[object] = []

    def call(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(40):
                count = draw.randrange(5)
                found = draw.choice(engines).run(x[: count + 1])
                if not np.array_equal(found, expected[count]):
                    wrong.append((seed, count))
        except BaseException as error:  # said by the main thread
            wrong.append(error)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for engine in engines:
        engine.close()
    assert not wrong and wait_until_no_threads()


def test_one_closes_while_others_run() -> None:
    data, x = network()
    engine = engaged(data, threads=2)
    expected, ends = engine.run(x), []

    def call() -> None:
        try:
            while True:
                assert np.array_equal(engine.run(x), expected)
        except BackendError as error:
            ends.append(str(error))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    time.sleep(0.1)
    engine.close()
    for caller in callers:
        caller.join(20)
    assert len(ends) == 3 and all("closed" in end for end in ends)
    assert wait_until_no_threads()


def _parts() -> SparseEngine:
    """Some of it ONNX Runtime's."""
    graph = Graph(3, 12, 16)
    graph.conv(graph.add("Erf", graph.conv("x", 8, 3)), 8, 8)
    engine = opened(graph.data(), threads=3)
    assert engine.layers == (2, 2) and "Erf" in engine.handed_over
    return engine


def _whole() -> SparseEngine:
    engine = SparseEngine(network()[0], threads=3)
    assert engine.isa == ""
    return engine


@pytest.mark.parametrize("make", [lambda: engaged(network()[0], threads=3), _parts, _whole])
def test_between_calls_nothing_is_computed(make: Callable[[], SparseEngine]) -> None:
    engine, x = make(), np.concatenate([network()[1]] * 8)
    for _ in range(2):
        engine.run(x)
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.03
    engine.close()


def test_results_do_not_depend_on_what_ran_before() -> None:
    data, x = network()
    engine = engaged(data, threads=2)
    expected = {n: engaged(data).run(x[:n]).tobytes() for n in range(1, 6)}  # type: ignore[union-attr]
    draw = random.Random(0)
    for _ in range(100):
        n = draw.randrange(1, 6)
        engine.run(x[: draw.randrange(1, 6)] * np.float32(draw.choice([0, 1e30, -1e-40, 3])))
        assert engine.run(x[:n]).tobytes() == expected[n]  # type: ignore[union-attr]
    engine.close()


def test_forks_while_other_threads_run() -> None:
    script("""
engine = engaged(data, threads=3)
expected = [engine.run(x[: n + 1]) for n in range(5)]
stop = threading.Event()
def call(n):
    while not stop.is_set():
        assert np.array_equal(engine.run(x[: n + 1]), expected[n])
callers = [threading.Thread(target=call, args=(n,)) for n in range(2)]
for caller in callers:
    caller.start()
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
for i in range(8):
    time.sleep(0.003 * i)
    child = os.fork()
    if child == 0:
        right = all(np.array_equal(engine.run(x[: n + 1]), expected[n]) for n in range(5))
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if np.array_equal(engine.run(x), expected[4]) else 1)
        right = right and os.waitpid(grandchild, 0)[1] == 0
        engine.close()
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for caller in callers:
    caller.join()
""")


@pytest.mark.parametrize("threads", [1, 3])
def test_the_interpreter_ends_while_a_thread_runs(threads: int) -> None:
    text = f"""
import atexit
atexit.register(time.sleep, 0.05)  # while what was registered later is done, and runs go on
engine = engaged(data, threads={threads})
other = engaged(data, threads=2)
def call(one):
    while True:
        one.run(np.concatenate([x] * 12))
for one in (engine, engine, other):
    threading.Thread(target=call, args=(one,), daemon=True).start()
time.sleep(0.15)
"""
    for _ in range(2):
        script(text)


def test_an_interrupt_while_running() -> None:
    process = started("""
engine = engaged(data, threads=2)
expected = engine.run(x)
big = np.concatenate([x] * 20)
print("ready", flush=True)
caught = 0
while caught < 10:
    try:
        while True:
            engine.run(big)
    except KeyboardInterrupt:
        caught += 1
        assert np.array_equal(engine.run(x), expected)
        print("caught", flush=True)
signal.signal(signal.SIGINT, signal.SIG_IGN)
assert np.array_equal(engine.run(x), expected)
engine.close()
""")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    for i in range(10):
        time.sleep(0.003 + 0.007 * i)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "caught\n"
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and not errors, errors


def test_a_storm_of_signals() -> None:
    script("""
count = 0
def handle(*_):
    global count
    count += 1
signal.signal(signal.SIGALRM, handle)
engine = engaged(data, threads=3)
expected = engine.run(x)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
for _ in range(300):
    assert np.array_equal(engine.run(x), expected)
    if _ % 20 == 0:
        time.sleep(0.003)
signal.setitimer(signal.ITIMER_REAL, 0)
assert count > 20
engine.close()
""")
