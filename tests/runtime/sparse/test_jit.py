from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("llvmlite")
from llvmlite import ir

from moon.errors import BackendError, UsageError
from moon.runtime.sparse.cache import Cache
from moon.runtime.sparse.isa import available
from moon.runtime.sparse.jit import Jit, fingerprint
from tests.runtime.sparse.small_kernels import calling, clearing, scaling

KERNELS = "tests.runtime.sparse.small_kernels"
_TYPE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


def run(address: int, data: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a kernel makes of whole vectors of sixteen floats."""
    out = np.ascontiguousarray(data).copy()
    assert out.size % 16 == 0
    _TYPE(address)(out.ctypes.data, out.size // 16)
    return out


def fresh(name: str, isa: str = "native", cache: Cache | None = None) -> Jit:
    """A Jit that shares no code with another test's."""
    return Jit(isa, cache, fingerprint=name)


@pytest.mark.parametrize("isa", available())
def test_a_kernel_computes_with_every_set(isa: str) -> None:
    data = np.arange(64, dtype=np.float32)
    jit = fresh("sets", isa)
    assert jit.isa == isa
    found = jit.addresses({"twice": scaling("twice", 2.0), "thrice": scaling("thrice", 3.0)})
    np.testing.assert_array_equal(run(found["twice"], data), data * 2 + 1)
    np.testing.assert_array_equal(run(found["thrice"], data), data * 3 + 1)
    np.testing.assert_array_equal(run(found["thrice"], data[:0]), data[:0])


def test_a_function_is_compiled_once_a_process() -> None:
    calls: list[str] = []

    def build(module: ir.Module) -> None:
        calls.append("once")
        scaling("k", 5.0)(module)

    first, second = fresh("once"), fresh("once")
    address = first.address("k", build)
    assert address == first.address("k", build) == second.address("k", build)
    assert first.addresses({}) == {}
    assert calls == ["once"]
    other = fresh("another").address("k", scaling("k", 7.0))
    assert other != address, "another fingerprint is another function"
    np.testing.assert_array_equal(run(other, np.ones(16, np.float32)), np.full(16, 8))


def test_threads_at_once_compile_a_function_once() -> None:
    calls: list[int] = []
    found: list[int] = []
    jit, start = fresh("threads"), threading.Barrier(8)

    def build(module: ir.Module) -> None:
        calls.append(1)
        scaling("k", 2.0)(module)

    def work() -> None:
        start.wait()
        found.append(jit.address("k", build))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(found) == 8 and len(set(found)) == 1


def test_code_outlives_its_jit() -> None:
    address = fresh("outlives").address("k", scaling("k", 2.0))
    gc.collect()
    for i in range(20):
        fresh(f"filler {i}").address("k", scaling("k", float(i)))
    np.testing.assert_array_equal(run(address, np.ones(16, np.float32)), np.full(16, 3))


def test_what_clears_memory_does_so_itself() -> None:
    """LLVM likes to call memset for it."""
    address = fresh("clear").address("clear", clearing("clear"))
    np.testing.assert_array_equal(run(address, np.ones(4096, np.float32)), np.zeros(4096))


def two(module: ir.Module) -> None:
    scaling("k", 2.0)(module)
    scaling("also", 2.0)(module)


def nonsense(module: ir.Module) -> None:
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), []), "k")
    function.append_basic_block().terminator = None  # a block without an end


def mistyped(module: ir.Module) -> None:
    function = ir.Function(module, ir.FunctionType(ir.IntType(64), []), "k")
    ir.IRBuilder(function.append_basic_block()).ret_void()


@pytest.mark.parametrize(
    ("build", "cause"),
    [
        (scaling("other", 2.0), "the kernel k has no function of that name"),
        (lambda module: None, "the kernel k has no function of that name"),
        (two, "the kernel k shows also to others as well"),
        (calling("k", "puts"), "the kernel k calls puts, which is not in it"),
        (calling("k", "llvm.exp.v16f32"), "the kernel k calls expf, which is not in it"),
        (nonsense, "LLVM refuses the kernel k"),
        (mistyped, "LLVM refuses the kernel k"),
    ],
)
def test_what_llvm_would_end_the_process_for_is_an_error(
    build: Callable[[Any], None], cause: str, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache")
    with pytest.raises(BackendError, match=cause):
        fresh(f"refused {build}", cache=cache).address("k", build)
    assert cache.folder is not None and not list(cache.folder.iterdir())
    good = fresh(f"refused {build}", cache=cache).address("k", scaling("k", 2.0))
    np.testing.assert_array_equal(run(good, np.ones(16, np.float32)), np.full(16, 3))


@pytest.mark.parametrize("key", ["", "1k", "a b", 'k"', "k\0", "é", "k" * 300])
def test_a_name_must_be_an_identifier(key: str) -> None:
    with pytest.raises(ValueError, match="no name for a function"):
        fresh("names").address(key, scaling("k", 2.0))


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(UsageError, match="no instruction set is called 'avx1024'"):
        fresh("x", "avx1024")


def test_an_error_of_the_builder_is_passed_on_and_the_next_try_works() -> None:
    def build(module: ir.Module) -> None:
        raise KeyError("a field")

    jit = fresh("builder")
    with pytest.raises(KeyError, match="a field"):
        jit.addresses({"fine": scaling("fine", 2.0), "k": build})
    assert jit.address("k", scaling("k", 2.0)) != 0


def test_a_fingerprint_follows_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_kernels.py").write_text("raise SystemError('imported')")
    (tmp_path / "more_kernels.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = fingerprint("some_kernels", "more_kernels")
    assert before == fingerprint("more_kernels", "some_kernels") != fingerprint("some_kernels")
    (tmp_path / "some_kernels.py").write_text("raise SystemError('changed')")
    assert fingerprint("some_kernels", "more_kernels") != before
    with pytest.raises(ModuleNotFoundError, match="no_such_kernels"):
        fingerprint("no_such_kernels")


# In processes of their own: what this one has compiled, it has.

_USE = f"""
import sys
import numpy as np
from moon.runtime.sparse.cache import Cache
from moon.runtime.sparse.jit import Jit, fingerprint
from tests.runtime.sparse.test_jit import run
from {KERNELS} import scaling
built = []
def build(name, factor):
    def write(module):
        built.append(name)
        scaling(name, factor)(module)
    return write
jit = Jit("native", Cache(sys.argv[1]), fingerprint=sys.argv[2])
names = [f"k{{i}}" for i in range(6)]
found = jit.addresses({{name: build(name, i + 2.0) for i, name in enumerate(names)}})
data = np.arange(32, dtype=np.float32)
for i, name in enumerate(names):
    assert np.array_equal(run(found[name], data), data * (i + 2) + 1), name
print(*built)
"""


def use(cache: Path, mark: str = "1") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", _USE, str(cache), mark],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def built(process: subprocess.Popen[str]) -> list[str]:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out.split()


def test_a_second_process_builds_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    names = [f"k{i}" for i in range(6)]
    assert built(use(cache)) == names
    assert built(use(cache)) == []
    assert built(use(cache, "2")) == names, "another source"
    entries = sorted(cache.iterdir(), key=lambda path: path.stat().st_mtime)
    assert len(entries) == 12
    entries[0].write_bytes(entries[0].read_bytes()[:-100])
    damaged = bytearray(entries[1].read_bytes())
    damaged[200] ^= 1
    entries[1].write_bytes(bytes(damaged))
    entries[2].unlink()
    # A right entry of another key, under this one's name.
    entries[3].write_bytes(entries[4].read_bytes())
    assert len(built(use(cache))) == 4
    assert built(use(cache)) == []


def test_an_object_that_lacks_its_function_is_compiled_anew(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert built(use(tmp_path / "cache"))
    assert cache.folder is not None
    for path in cache.folder.iterdir():
        key = bytes.fromhex(path.stem)
        data = cache.get(key)
        assert data is not None
        cache.put(key, data.replace(b"\0k", b"\0K"))  # with a right checksum
    assert len(built(use(tmp_path / "cache"))) == 6
    assert built(use(tmp_path / "cache")) == []


def test_eight_processes_with_an_empty_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for process in [use(cache) for _ in range(8)]:
        built(process)
    assert built(use(cache)) == []
    assert len(list(cache.iterdir())) == 6


def script(text: str) -> None:
    head = f"from tests.runtime.sparse.test_jit import *\nfrom {KERNELS} import *\n"
    done = subprocess.run(
        [sys.executable, "-c", head + text], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_fork_while_another_thread_compiles_waits_for_it() -> None:
    script("""
import os, time
inside = threading.Event()
def slow(module):
    inside.set()
    time.sleep(0.5)
    scaling("slow", 2.0)(module)
jit = fresh("fork")
thread = threading.Thread(target=jit.address, args=("slow", slow))
thread.start()
inside.wait()
child = os.fork()
data = np.ones(16, np.float32)
assert run(jit.address("k", scaling("k", 3.0)), data)[0] == 4
assert run(jit.address("slow", scaling("slow", 2.0)), data)[0] == 3
if child == 0:
    os._exit(0)
thread.join()
assert os.waitpid(child, 0)[1] == 0
""")


def test_a_thread_in_a_kernel_survives_the_end_of_the_interpreter() -> None:
    script("""
import time
address = fresh("end").address("k", scaling("k", 1.0))
data = np.zeros(1 << 24, np.float32)
def work():
    while True:
        _TYPE(address)(data.ctypes.data, data.size // 16)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
""")
