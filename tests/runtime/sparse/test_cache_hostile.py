"""Engines over caches that are damaged, foreign, read-only, missing or shared: always the same.

The trust boundary: who can write as the user can run code as the user, so a checksum is no
defence against him and is not meant to be. It is against damage; owners and modes are against
everybody else.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moon.runtime.sparse.cache import Cache
from moon.runtime.sparse.elf import read_symbols

from .scripts import output, script, started

PRINT = "print(output(2))"
NOBODY = 65534


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, engine_cache: None) -> Path:
    """A cache with all of the network's kernels."""
    folder = tmp_path_factory.mktemp("filled")
    script(PRINT, {"MOON_CACHE_DIR": str(folder)})
    assert len(list(folder.glob("*.object"))) > 5
    return folder


@pytest.fixture(scope="module")
def expected(engine_cache: None) -> str:
    return output()


@pytest.fixture
def folder(filled: Path, tmp_path: Path) -> Path:
    shutil.copytree(filled, tmp_path / "cache")
    return tmp_path / "cache"


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.object"))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(path.name).randrange(len(data))] ^= 0x10
    path.write_bytes(bytes(data))


def _link(path: Path) -> None:
    elsewhere = path.with_suffix(".elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _sealed(path: Path, change: Callable[[bytes], bytes]) -> None:
    """An entry whose object is another, and whose checksum is right."""
    data = path.read_bytes()
    made = change(data[72:])
    path.write_bytes(data[:40] + hashlib.sha256(made).digest() + made)


def _huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 40)


def _renamed(path: Path) -> None:
    """An object that has not the function it was asked for."""
    _sealed(
        path, lambda data: data.replace(b"\0conv_", b"\0vnoc_").replace(b"\0point_", b"\0tniop_")
    )


HOSTILE: tuple[Callable[[Path], object], ...] = (
    lambda path: path.write_bytes(b""),
    lambda path: os.truncate(path, path.stat().st_size // 2),
    lambda path: os.truncate(path, path.stat().st_size - 1),
    _flip,
    lambda path: shutil.copy(entries(path.parent)[-1], path),
    lambda path: path.chmod(0o644),
    lambda path: path.chmod(0o602),
    _link,
    _pipe,
    _huge,
    lambda path: _sealed(path, lambda data: b"junk" * 100),
    lambda path: _sealed(path, lambda data: data[: len(data) // 2]),
    _renamed,
)


@pytest.mark.parametrize("turn", range(2))
def test_hostile_entries_are_made_anew(turn: int, folder: Path, expected: str) -> None:
    before = entries(folder)
    for i, path in enumerate(before[:-1]):
        HOSTILE[(i + 7 * turn) % len(HOSTILE)](path)
    assert script(PRINT, {"MOON_CACHE_DIR": str(folder)}) == expected
    after = entries(folder)
    assert after == before
    cache = Cache(folder)
    for path in after:
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600 and not path.is_symlink()
        data = cache.get(bytes.fromhex(path.stem))
        assert data is not None and not read_symbols(data).missing


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_entries_of_another_user_are_made_anew(folder: Path, expected: str) -> None:
    for path in entries(folder):
        os.chown(path, NOBODY, NOBODY)
    assert script(PRINT, {"MOON_CACHE_DIR": str(folder)}) == expected
    assert all(path.stat().st_uid == 0 for path in entries(folder))


def test_what_the_user_sealed_is_trusted(folder: Path) -> None:
    """The boundary, see above: the same user's entry with a right checksum is taken."""
    path = entries(folder)[0]
    _sealed(path, lambda data: data + b"\0")
    assert Cache(folder).get(bytes.fromhex(path.stem)) == path.read_bytes()[72:]


@pytest.fixture
def bare() -> Iterator[Path]:
    """A folder that everybody can enter."""
    with tempfile.TemporaryDirectory() as found:
        Path(found).chmod(0o755)
        yield Path(found)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_home_that_cannot_be_written(bare: Path, expected: str) -> None:
    """As a user who owns nothing. The process becomes him once everything is imported."""
    text = f"""
import moon.runtime.sparse.machine
from moon.runtime.sparse.isa import available
available()
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
print(output(2))
"""
    variables = {"MOON_CACHE_DIR": None, "XDG_CACHE_HOME": None, "HOME": str(bare)}
    assert script(text, variables) == expected
    assert not list(bare.iterdir())


ODD: list[dict[str, str]] = [
    {"HOME": "/no/such/home"},
    {"HOME": "relative"},
    {"XDG_CACHE_HOME": "/proc/self/none"},
    {"XDG_CACHE_HOME": "relative", "HOME": "/no/such/home"},
    {"XDG_CACHE_HOME": "/dev/null"},
    {"MOON_CACHE_DIR": "/dev/null"},
    {"MOON_CACHE_DIR": "~no-such-user/cache"},
    {"MOON_CACHE_DIR": "/sys/moon"},
    {"MOON_CACHE_DIR": "x" * 3000},
    {"MOON_CACHE_DIR": "/proc/1/a\udcff\n/../b"},
]


def test_odd_variables(tmp_path: Path, expected: str) -> None:
    text = f"""
from moon.runtime.sparse.cache import Cache
os.chdir({str(tmp_path)!r})
for variables in {ODD!r}:
    os.environ |= {{"HOME": "/proc/self", "XDG_CACHE_HOME": "", "MOON_CACHE_DIR": "", **variables}}
    cache = Cache()
    assert cache.folder is None and cache.reason, (variables, cache.folder)
    cache.put(bytes(32), b"code")
    assert cache.get(bytes(32)) is None
print(output())
"""
    assert script(text) == expected


def test_a_working_folder_that_is_gone(tmp_path: Path, expected: str) -> None:
    (tmp_path / "gone").mkdir()
    text = f"""
from moon.runtime.sparse.cache import Cache
os.chdir({str(tmp_path / "gone")!r})
os.rmdir(os.getcwd())
assert Cache("there").folder is None and Cache("there").reason == "there is no working folder"
print(output())
"""
    assert script(text, {"MOON_CACHE_DIR": "cache"}) == expected


def test_processes_at_once_with_an_empty_cache(tmp_path: Path, expected: str) -> None:
    folder = {"MOON_CACHE_DIR": str(tmp_path / "shared")}
    processes = [started(PRINT, folder) for _ in range(4)]
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and not errors, errors
        assert out.strip() == expected
    assert not [path for path in (tmp_path / "shared").iterdir() if path.suffix != ".object"]


def test_a_process_killed_while_it_compiles_leaves_nothing_that_hurts(
    tmp_path: Path, expected: str
) -> None:
    folder = tmp_path / "killed"
    for delay in (0.0, 0.02, 0.1):
        process = started('print("ready", flush=True); output()', {"MOON_CACHE_DIR": str(folder)})
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert script(PRINT, {"MOON_CACHE_DIR": str(folder)}) == expected


def test_a_full_disk_is_no_matter(tmp_path: Path, expected: str) -> None:
    text = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (99, 99))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
print(output())
"""
    folder = tmp_path / "full"
    assert script(text, {"MOON_CACHE_DIR": str(folder)}) == expected
    assert not list(folder.iterdir())


def test_symbols_of_objects_that_are_damaged_anywhere(filled: Path) -> None:
    draw, seen = random.Random(0), 0
    objects = [path.read_bytes()[72:] for path in entries(filled)]
    for _ in range(3000):
        data = bytearray(draw.choice(objects))
        for _ in range(draw.choice((1, 2, 5))):
            # Headers and tables matter: the beginning and the end.
            at = draw.choice((draw.randrange(64), -draw.randrange(1, 900)))
            data[at] = draw.choice((0, 0xFF, draw.randrange(256)))
        try:
            read_symbols(bytes(data[: draw.choice((len(data), draw.randrange(len(data)))) or 1]))
        except ValueError:
            seen += 1
    assert 300 < seen < 3000
