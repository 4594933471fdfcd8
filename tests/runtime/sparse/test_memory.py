from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from moon.errors import UsageError
from moon.runtime.sparse.memory import GUARD, Arena, Life, Reach, Space, aligned, arrange

ROOT = Path(__file__).resolve().parents[3]
lives = some.dictionaries(
    some.text(max_size=3),
    some.builds(
        lambda nbytes, first, length: Life(nbytes, first, first + length),
        some.integers(1, 5000), some.integers(-1, 20), some.integers(0, 8),
    ),
    max_size=25,
)  # fmt: skip


@given(lives)
def test_tensors_that_live_together_do_not_overlap(lives: dict[str, Life]) -> None:
    offsets, total = arrange(lives)
    assert offsets.keys() == lives.keys()
    for name, life in lives.items():
        start, end = offsets[name], offsets[name] + life.nbytes
        assert start >= 0 and end <= total and start % 64 == 0
        for other, its in lives.items():
            together = its.first <= life.last and life.first <= its.last
            if other != name and together:
                assert offsets[other] + its.nbytes <= start or end <= offsets[other]


@given(lives)
def test_no_more_memory_than_all_tensors_take(lives: dict[str, Life]) -> None:
    assert arrange(lives)[1] <= sum(-(-life.nbytes // 64) * 64 for life in lives.values())


def test_a_place_is_taken_again() -> None:
    offsets, total = arrange({"a": Life(640, 0, 1), "b": Life(640, 1, 2), "c": Life(640, 2, 3)})
    assert offsets["a"] == offsets["c"] and total == 1280


@pytest.mark.parametrize("guard", ["", "after", "before"])
def test_memory_is_aligned_and_has_room_around_it(guard: str) -> None:
    space = Space(guard)  # type: ignore[arg-type]
    for nbytes in (64, 4096, 6400):
        memory = space.take(nbytes, Reach(200, 300))
        assert memory.nbytes == nbytes and memory.ctypes.data % 64 == 0
        memory[:] = 1
        ctypes.string_at(memory.ctypes.data - 200, nbytes + 500)
    table = np.arange(7, dtype=np.uint16)
    assert np.array_equal(space.table(table[::2]), table[::2])
    assert aligned(10, Reach(1, 1)).ctypes.data % 4096 == 0


@pytest.mark.parametrize("guard", ["", "after"])
def test_an_arena_keeps_what_lives(guard: str) -> None:
    lives = {"a": Life(256, 0, 3), "b": Life(128, 1, 2), "c": Life(64, 3, 3)}
    arena = Arena(lives, {"a": Reach(64, 64)}, Space(guard))  # type: ignore[arg-type]
    arena.floats("a")[:] = 1
    arena.floats("b")[:] = 2
    arena.floats("c")[:] = 3
    assert (arena.floats("a") == 1).all() and arena.floats("a").nbytes == 256


def test_the_environment_switches_guards_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, meant in (("1", "after"), ("before", "before"), ("0", ""), ("", "")):
        monkeypatch.setenv(GUARD, said)
        assert Space().guard == meant
    monkeypatch.setenv(GUARD, "sometimes")
    with pytest.raises(UsageError, match="sometimes"):
        Space()
    assert Space("").guard == ""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "dev", "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT
    )


TOUCH = """
import ctypes, sys
from moon.runtime.sparse.memory import Reach, Space
guard, at = sys.argv[1], int(sys.argv[2])
memory = Space(guard).take(640, Reach(64, 64))
ctypes.string_at(memory.ctypes.data + at, 1)
"""


@pytest.mark.parametrize(
    "guard, at, dies",
    [("after", 640 + 63, False), ("after", 640 + 64, True), ("before", -64, False),
     ("before", -65, True)],
)  # fmt: skip
def test_a_guard_catches_the_first_byte_beyond(guard: str, at: int, dies: bool) -> None:
    done = python(TOUCH, guard, str(at))
    assert done.returncode == (-signal.SIGSEGV if dies else 0), done.stderr


@pytest.mark.parametrize("guard", ["after", "before"])
def test_convolutions_stay_within_their_memory(guard: str) -> None:
    done = python("from tests.runtime.sparse.guarded import main; import sys; "
                  "main(sys.argv[1], 100, 120)", guard)  # fmt: skip
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 40


CARELESS = """
import sys
from moon.runtime.sparse.geometry import Geometry
Geometry.reach = property(lambda self: (0, 0))
from tests.runtime.sparse.guarded import main
main(sys.argv[1], 100, 140)
"""


@pytest.mark.parametrize("guard", ["after", "before"])
def test_reads_beyond_that_are_not_declared_are_found(guard: str) -> None:
    assert python(CARELESS, guard).returncode == -signal.SIGSEGV
