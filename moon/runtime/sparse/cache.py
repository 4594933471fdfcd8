"""Object code of kernels, kept on disk between processes.

Loading an entry runs it, so the folder must be one in which only its user can write, and an
entry is loaded only when it is a plain file of that user alone, carries the key it was asked for
and matches its checksum. Anything else is deleted and made anew. Where there is no such folder
nothing is kept, and everything works, a little slower. That is a defence against everybody but the
user himself: who can write as the user can run code as the user anyway, so the checksum is against
damage alone.

An entry is ``MOONOBJ1``, the key (32 bytes), the SHA-256 of the object (32 bytes), the object.
Its name is the key in hexadecimal and ``.object``.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["LIMIT", "VARIABLE", "Cache", "default_folder"]

VARIABLE = "MOON_CACHE_DIR"
LIMIT = 256 << 20
_MAGIC = b"MOONOBJ1"
_HEADER = len(_MAGIC) + 32 + 32
_LARGEST = 16 << 20
_ENTRY = re.compile(r"[0-9a-f]{64}\.object")
_ASIDE = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]+\.tmp")
_SUPPORTED = sys.platform != "win32"  # owners and modes mean what is checked here
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_HOUR, _DAY = 3600, 86400
_told: set[str] = set()
_lock = threading.Lock()


def _renew() -> None:
    global _lock
    _lock = threading.Lock()  # who held it when the process was forked is not in the child


if _SUPPORTED:
    os.register_at_fork(after_in_child=_renew)


def default_folder() -> Path | None:
    """$MOON_CACHE_DIR, $XDG_CACHE_HOME/moon/engine or ~/.cache/moon/engine; None without a home."""
    try:
        if own := os.environ.get(VARIABLE):
            return Path(own).expanduser().absolute()
        shared = Path(os.environ.get("XDG_CACHE_HOME") or "")
        if not shared.is_absolute():  # relative ones are to be ignored
            home = Path.home()
            if not home.is_dir():  # a user without one, who should not get one by this
                return None
            shared = home / ".cache"
    except (RuntimeError, OSError):
        return None
    return shared / "moon" / "engine" if shared.is_absolute() else None


class Cache:
    """Entries by key, in one folder. Safe for several threads and processes; never raises.

    Args:
        folder: where entries are; None for :func:`default_folder`. Made when missing.
        limit: bytes of entries to keep; the oldest go first.
        largest: bytes of an object; larger ones are not kept.

    Attributes:
        folder: where entries are, None where nothing is kept.
        reason: why nothing is kept, "" otherwise.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        limit: int = LIMIT,
        largest: int = _LARGEST,
    ) -> None:
        wanted = default_folder() if folder is None else _absolute(Path(folder))
        self.folder: Path | None = None
        self._limit, self._largest = limit, largest
        self._size: int | None = None
        if not _SUPPORTED:
            self.reason = "code is not kept on this system"
        elif wanted is None:
            self.reason = f"there is no {'home' if folder is None else 'working'} folder"
        else:
            self.folder, self.reason = _prepared(wanted)

    def get(self, key: bytes) -> bytes | None:
        """The object stored under ``key`` (32 bytes); None when none is there to be trusted."""
        name = _name(key)
        try:
            with self._open() as folder:
                try:
                    data = _read(folder, name, key, self._largest)
                except FileNotFoundError:
                    return None
                except (OSError, ValueError):
                    os.unlink(name, dir_fd=folder)
                    return None
        except OSError:
            return None
        return data

    def put(self, key: bytes, data: bytes) -> None:
        """Store ``data`` under ``key`` (32 bytes), where that is possible."""
        name = _name(key)
        if not 0 < len(data) <= self._largest:
            return
        entry = _MAGIC + key + hashlib.sha256(data).digest() + data
        with suppress(OSError), self._open() as folder:
            _write(folder, name, entry)
            with _lock:
                if self._size is not None:
                    self._size += len(entry)
                if self._size is None or self._size > self._limit:
                    self._size = _prune(folder, self._limit)

    @contextmanager
    def _open(self) -> Iterator[int]:
        if self.folder is None:
            raise FileNotFoundError(errno.ENOENT, self.reason)
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _check(os.fstat(folder), str(self.folder), own=True)  # it may be another by now
            yield folder
        finally:
            os.close(folder)


def _absolute(folder: Path) -> Path | None:
    try:
        return folder.absolute()
    except OSError:  # the working folder is gone
        return None


def _name(key: bytes) -> str:
    if len(key) != 32:
        raise ValueError(f"a key has 32 bytes, got {len(key)}")
    return key.hex() + ".object"


def _prepared(wanted: Path) -> tuple[Path | None, str]:
    """The folder, made and checked, or why there is none; a folder not to be trusted is told of."""
    try:
        real = Path(os.path.realpath(wanted))
        home = Path(os.path.realpath(Path.home()))
    except (OSError, RuntimeError, ValueError):
        real, home = wanted, Path("/")
    try:
        if not real.is_dir():
            missing = [path for path in (real, *real.parents) if not path.exists()]
            _check_all(missing[-1].parent if missing else real, home)
            for path in reversed(missing):
                with suppress(FileExistsError):  # another process was faster
                    path.mkdir(mode=0o700)
        _check_all(real, home)
        _check(real.stat(), str(real), own=True)
    except PermissionError as error:
        if error.errno is None:
            _tell(str(error))
            return None, str(error)
        return None, f"{real}: {error.strerror}"
    except (OSError, ValueError) as error:
        return None, f"{real}: {getattr(error, 'strerror', None) or error}"
    return real, ""


def _check_all(folder: Path, home: Path) -> None:
    """That nobody else can put another folder in the place of this one."""
    for path in (folder, *folder.parents):
        _check(path.stat(), str(path), own=False)
        if path == home:
            return


def _check(found: os.stat_result, path: str, *, own: bool) -> None:
    user = os.geteuid()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if found.st_uid != user and (own or found.st_uid != 0):
        raise PermissionError(f"{path} belongs to another user")
    # In a folder such as /tmp others can write, yet not rename or remove what is not theirs.
    if found.st_mode & _OTHERS_WRITE and (own or not found.st_mode & stat.S_ISVTX):
        raise PermissionError(f"others can write in {path} (chmod go-w would end that)")


def _tell(reason: str) -> None:
    with _lock:
        if reason in _told:
            return
        _told.add(reason)
    warnings.warn(
        f"compiled kernels are not kept, since {reason}. Set {VARIABLE} to a folder of your own.",
        RuntimeWarning,
        stacklevel=4,
    )


def _read(folder: int, name: str, key: bytes, largest: int) -> bytes:
    """Raises FileNotFoundError; ValueError or OSError for what must not be there."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, dir_fd=folder), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_mode & _OTHERS:
            raise ValueError("not a file of one user alone")
        if found.st_uid != os.geteuid() or not _HEADER < found.st_size <= _HEADER + largest:
            raise ValueError("not an entry")
        entry = file.read(found.st_size)
        if time.time() - found.st_mtime > _DAY:
            with suppress(OSError):
                os.utime(file.fileno())  # what is used stays
    data = entry[_HEADER:]
    if entry[:_HEADER] != _MAGIC + key + hashlib.sha256(data).digest():
        raise ValueError("damaged")
    return data


def _write(folder: int, name: str, entry: bytes) -> None:
    aside = f".{name.removesuffix('.object')}.{secrets.token_hex(8)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        # Not flushed to the disk: the checksum tells when a crash left half of it.
        with os.fdopen(os.open(aside, flags, 0o600, dir_fd=folder), "wb") as file:
            file.write(entry)
        os.rename(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        with suppress(OSError):
            os.unlink(aside, dir_fd=folder)
        raise


def _prune(folder: int, limit: int) -> int:
    """Remove the oldest entries over ``limit``, and leftovers; the bytes that stay."""
    entries: list[tuple[float, int, str]] = []
    now = time.time()
    for item in os.listdir(folder):
        entry, aside = _ENTRY.fullmatch(item), _ASIDE.fullmatch(item)
        if not (entry or aside):
            continue  # not ours
        with suppress(OSError):
            found = os.stat(item, dir_fd=folder, follow_symlinks=False)
            if entry:
                entries.append((found.st_mtime, found.st_size, item))
            elif now - found.st_mtime > _HOUR:
                os.unlink(item, dir_fd=folder)
    size = sum(length for _, length, _ in entries)
    if size <= limit:
        return size
    for _, length, item in sorted(entries):
        if size <= limit * 3 // 4:
            break
        with suppress(OSError):
            os.unlink(item, dir_fd=folder)
            size -= length
    return size
