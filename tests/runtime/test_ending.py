"""The interpreter ends while daemon threads run a model: quietly, and soon."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moon.runtime import ending
from moon.runtime.ending import UnderWay

_TEXT = """
import os, threading, time
import numpy as np
from moon.runtime import SparseEngine, open_backend
from tests.bundles import make_model
data = make_model(classes=3).SerializeToString()
def opened():
    if {name!r} == "engine":
        engine = SparseEngine(data, threads={threads})
        assert engine.isa == ""  # all of it is ONNX Runtime's
        return engine
    return open_backend(data, {name!r}, threads={threads})
one = opened()
(image,) = [value for value in SparseEngine(data).inputs if value.name == "input"]
x = np.zeros((4096, *image.shape[1:]), np.float32)
def call():
    while True:
        one.run(x)
def reopen():
    while True:
        opened()
for target in (call, call, reopen):
    threading.Thread(target=target, daemon=True).start()
time.sleep(0.1)
"""


def ended(text: str) -> None:
    """Run a program that must end well and say nothing."""
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=60,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["engine", "sparse", "onnxruntime"])
def test_daemon_threads_within_onnx_runtime(name: str, threads: int) -> None:
    ended(_TEXT.format(name=name, threads=threads))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_does_not_wait_for_its_parents_threads() -> None:
    more = """
import sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
start = time.monotonic()
if not (child := os.fork()):
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0 and time.monotonic() - start < 5
"""
    ended(_TEXT.format(name="onnxruntime", threads=1) + more)


def test_it_waits_for_who_is_within_and_lets_nobody_in() -> None:
    under_way, entered, leave, seen = UnderWay(), threading.Event(), threading.Event(), []

    def work() -> None:
        with under_way:
            entered.set()
            leave.wait(10)
        seen.append("left")
        with pytest.raises(SystemExit), under_way:
            seen.append("again")

    worker = threading.Thread(target=work)
    worker.start()
    entered.wait(10)
    threading.Timer(0.05, leave.set).start()
    under_way.end()
    worker.join(10)
    assert seen == ["left"]
    with under_way:  # the main thread may, for what else is done at the end
        pass


def test_it_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "_MOST_SECONDS", 0.05)
    under_way, entered, leave = UnderWay(), threading.Event(), threading.Event()

    def work() -> None:
        with under_way:
            entered.set()
            leave.wait(10)

    worker = threading.Thread(target=work)
    worker.start()
    entered.wait(10)
    start = time.monotonic()
    under_way.end()
    assert time.monotonic() - start < 5
    leave.set()
    worker.join(10)
