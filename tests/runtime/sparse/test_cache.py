from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.runtime.sparse import cache as module
from moon.runtime.sparse.cache import VARIABLE, Cache, default_folder

KEY = bytes(range(32))
NAME = KEY.hex() + ".object"
OTHER = bytes(32)
NOBODY = 65534


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of its own, and no variables set."""
    for variable in (VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(module, "_told", set())
    return tmp_path


def entry(data: bytes, key: bytes = KEY) -> bytes:
    return b"MOONOBJ1" + key + hashlib.sha256(data).digest() + data


def plant(cache: Cache, data: bytes, mode: int = 0o600) -> Path:
    assert cache.folder is not None
    path = cache.folder / NAME
    path.write_bytes(data)
    path.chmod(mode)
    return path


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom modes bind; root becomes nobody for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_what_is_put_comes_back(home: Path) -> None:
    cache = Cache()
    assert cache.folder == home / ".cache/moon/engine" and cache.reason == ""
    assert cache.get(KEY) is None
    cache.put(KEY, b"code")
    assert cache.get(KEY) == Cache().get(KEY) == b"code"
    assert cache.get(OTHER) is None
    cache.put(KEY, b"other code")
    assert cache.get(KEY) == b"other code"
    with pytest.raises(ValueError, match="32 bytes, got 3"):
        cache.get(b"abc")


def test_nobody_else_can_read_or_write_what_is_made(home: Path) -> None:
    before = os.umask(0)
    try:
        cache = Cache()
        cache.put(KEY, b"code")
    finally:
        os.umask(before)
    assert cache.folder is not None
    for folder in (home / ".cache", home / ".cache/moon", cache.folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in cache.folder.iterdir()] == [NAME]
    assert stat.S_IMODE((cache.folder / NAME).stat().st_mode) == 0o600


def test_the_folder_is_found_by_the_variables(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_folder() == home / ".cache/moon/engine"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == home / ".cache/moon/engine"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_folder() == Path("/x/moon/engine")
    monkeypatch.setenv(VARIABLE, "~/mine")
    assert default_folder() == home / "mine"
    monkeypatch.setenv(VARIABLE, "")
    assert default_folder() == Path("/x/moon/engine")


def test_a_missing_home_is_not_made(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home / "nowhere"))
    cache = Cache()
    cache.put(KEY, b"code")
    assert cache.get(KEY) is None and cache.folder is None
    assert cache.reason == "there is no home folder" and not (home / "nowhere").exists()


def test_a_home_that_cannot_be_written_keeps_nothing_and_says_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not in pytest's own folder, which nobody else can enter.
    with tempfile.TemporaryDirectory() as bare:
        monkeypatch.setenv("HOME", bare)
        Path(bare).chmod(0o555)
        with unprivileged(), warnings.catch_warnings():
            warnings.simplefilter("error")
            cache = Cache()
            cache.put(KEY, b"code")
            assert cache.folder is None and cache.get(KEY) is None
        assert "Permission denied" in cache.reason
        Path(bare).chmod(0o755)


def test_a_folder_that_becomes_read_only_still_serves(home: Path) -> None:
    cache = Cache()
    cache.put(KEY, b"code")
    assert cache.folder is not None
    cache.folder.chmod(0o500)
    cache.put(OTHER, b"code")
    assert cache.get(KEY) == b"code"
    assert os.geteuid() == 0 or cache.get(OTHER) is None
    cache.folder.chmod(0o700)


@pytest.mark.parametrize("where", [".cache", ".cache/moon", ".cache/moon/engine"])
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_others_can_write_in_is_refused_once(home: Path, where: str, mode: int) -> None:
    Cache().put(KEY, b"code")
    (home / where).chmod(mode)
    with pytest.warns(RuntimeWarning, match=r"others can write in .*chmod go-w.*MOON_CACHE_DIR"):
        cache = Cache()
    assert cache.get(KEY) is None and "others can write" in cache.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Cache().folder is None
    (home / where).chmod(0o755)
    assert Cache().get(KEY) == b"code"


def test_a_folder_opened_up_later_is_refused_too(home: Path) -> None:
    cache = Cache()
    cache.put(KEY, b"code")
    assert cache.folder is not None
    cache.folder.chmod(0o777)
    assert cache.get(KEY) is None
    cache.folder.chmod(0o700)
    assert cache.get(KEY) == b"code"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("where", [".cache", ".cache/moon/engine"])
def test_a_folder_of_another_user_is_refused(home: Path, where: str) -> None:
    Cache()
    os.chown(home / where, NOBODY, NOBODY)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert Cache().folder is None


def test_outside_home_every_parent_counts_but_those_like_tmp(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "elsewhere"))
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    assert Cache(shared / "mine").folder == shared / "mine"
    shared.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="others can write in .*shared"):
        assert Cache(shared / "mine").folder is None
    shared.chmod(0o1777)
    monkeypatch.setattr(module, "_told", set())
    with pytest.warns(RuntimeWarning, match="others can write in .*shared"):
        assert Cache(shared).folder is None


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert Cache(tmp_path / "file").reason.endswith("Not a directory")
    assert Cache(tmp_path / "file" / "below").reason.endswith("Not a directory")
    assert Cache(tmp_path / ("x" * 300)).reason.endswith("File name too long")
    assert Cache("a\0b").folder is None


@pytest.mark.parametrize(
    "planted",
    [
        b"",
        b"evil",
        entry(b"code")[:-1],
        entry(b"code") + b"x",
        entry(b"code")[:72],
        b"MOONOBJ0" + entry(b"code")[8:],
        entry(b"code", OTHER),
        entry(b"good")[:-4] + b"evil",
    ],
)
def test_a_planted_or_damaged_entry_is_removed(home: Path, planted: bytes) -> None:
    cache = Cache()
    path = plant(cache, planted)
    assert cache.get(KEY) is None
    assert not path.exists()
    cache.put(KEY, b"code")
    assert cache.get(KEY) == b"code"


@given(st.integers(0, 75), st.integers(1, 255))
def test_a_flipped_byte_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, at: int, change: int
) -> None:
    cache = Cache(tmp_path_factory.getbasetemp() / "flipped")
    data = bytearray(entry(b"code"))
    data[at] ^= change
    path = plant(cache, bytes(data))
    assert cache.get(KEY) is None and not path.exists()


@pytest.mark.parametrize("mode", [0o606, 0o660, 0o644])
def test_a_right_entry_open_to_others_is_removed(home: Path, mode: int) -> None:
    cache = Cache()
    path = plant(cache, entry(b"code"), mode)
    assert cache.get(KEY) is None and not path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_right_entry_of_another_user_is_removed(home: Path) -> None:
    cache = Cache()
    path = plant(cache, entry(b"code"))
    os.chown(path, NOBODY, NOBODY)
    assert cache.get(KEY) is None and not path.exists()


def test_links_pipes_and_folders_are_no_entries(home: Path) -> None:
    cache = Cache()
    assert cache.folder is not None
    (home / "target").write_bytes(entry(b"code"))
    (home / "target").chmod(0o600)
    path = cache.folder / NAME
    path.symlink_to(home / "target")
    assert cache.get(KEY) is None
    assert not path.is_symlink() and (home / "target").exists()
    os.mkfifo(path, 0o600)
    assert cache.get(KEY) is None and not path.exists()
    path.mkdir()
    assert cache.get(KEY) is None
    cache.put(KEY, b"code")
    assert cache.get(KEY) is None and [p.name for p in cache.folder.iterdir()] == [NAME]


def test_writing_does_not_follow_a_link(home: Path) -> None:
    cache = Cache()
    assert cache.folder is not None
    (home / "precious").write_text("kept")
    (cache.folder / NAME).symlink_to(home / "precious")
    cache.put(KEY, b"code")
    assert (home / "precious").read_text() == "kept" and cache.get(KEY) == b"code"


def test_the_oldest_go_when_there_is_too_much(home: Path) -> None:
    cache = Cache(limit=10_000)
    assert cache.folder is not None
    foreign = cache.folder / "notes.txt"
    foreign.write_bytes(bytes(50_000))
    left = cache.folder / f".{'0' * 64}.{'0' * 16}.tmp"
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    keys = [bytes([i]) * 32 for i in range(40)]
    for i, key in enumerate(keys):
        cache.put(key, bytes(1_000))
        os.utime(cache.folder / (key.hex() + ".object"), (1_000 + i, 1_000 + i))
    size = sum(path.stat().st_size for path in cache.folder.glob("*.object"))
    assert size <= 10_000 and foreign.exists() and not left.exists()
    kept = [key for key in keys if cache.get(key) is not None]
    assert len(kept) >= 6 and kept == keys[-len(kept) :]
    cache.put(KEY, bytes(17 << 20))
    assert cache.get(KEY) is None, "one entry has its limit too"


def test_what_is_used_grows_no_older(home: Path) -> None:
    cache = Cache()
    path = plant(cache, entry(b"code"))
    os.utime(path, (1_000, 1_000))
    assert cache.get(KEY) == b"code" and path.stat().st_mtime > 1_000
