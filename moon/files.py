"""Files and folders that are either whole or not there, and their hashes.

Everything is written aside, in the same folder, then renamed into place. A
process killed half-way leaves the old file, and at worst a hidden ``.NAME.*.tmp``.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moon.errors import MoonError, UsageError

__all__ = [
    "canonical_json",
    "replacing_directory",
    "sha256_bytes",
    "sha256_file",
    "write_bytes",
    "write_json",
    "write_text",
]

_REMEDIES = {
    errno.ENOSPC: "Free some space, or write to another disk",
    errno.EDQUOT: "Free some of your quota, or write to another disk",
    errno.EFBIG: "Raise the file size limit (ulimit -f), or write to another disk",
    errno.EACCES: "Check the permissions of the folder, or write to another one",
    errno.EPERM: "Check the permissions of the folder, or write to another one",
    errno.EROFS: "Write to a folder that is not mounted read-only",
    errno.EISDIR: "Name a file, not a folder",
    errno.ENOTDIR: "A part of the path is a file: name a path whose parents are folders",
    errno.EEXIST: "A part of the path is a file: name a path whose parents are folders",
    errno.ENAMETOOLONG: "Choose a shorter name",
}
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` atomically, making missing parent folders.

    A symbolic link keeps pointing where it does; its target is replaced. A device or
    pipe (``/dev/stdout``) is written to directly.

    Raises:
        MoonError: could not be written (disk full, no permission ...); any old file is intact.
    """
    given = Path(path)
    try:
        if given.exists() and not given.is_file() and not given.is_dir():
            given.write_bytes(data)
            return
        target = given.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _write_aside(target, data)
    except OSError as error:
        raise _could_not_write(given, error) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`write_bytes` of ``text`` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """`write_bytes` of ``obj`` as indented JSON.

    Raises:
        ValueError: ``obj`` holds NaN or an infinity, which JSON cannot.
    """
    write_text(path, json.dumps(obj, indent=2, allow_nan=False) + "\n")


@contextmanager
def replacing_directory(
    path: str | os.PathLike[str], *, force: bool, marker: str | None = None
) -> Iterator[Path]:
    """Fill a new folder aside, and rename it to ``path`` when the block ends well.

    Yields:
        The folder to fill. On any exception it is removed and what was at ``path`` stays.

    Args:
        path: the folder to make. An existing empty folder counts as missing.
        force: replace a folder that is there.
        marker: with ``force``, replace only a folder that holds this file, so that a
            mistyped path cannot delete somebody's other files.

    Raises:
        UsageError: ``path`` exists and may not be replaced.
        MoonError: could not be written.
    """
    given = Path(path)
    try:
        target = given.resolve()
        _check_replaceable(given, target, force, marker)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(target, "tmp")
        aside.mkdir()
    except OSError as error:
        raise _could_not_write(given, error) from error
    try:
        yield aside
        _flush_tree(aside)
        _swap_in(aside, target)
    except OSError as error:
        raise _could_not_write(given, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(obj: Any) -> bytes:
    """The one JSON spelling of ``obj`` to hash: sorted keys, no spaces, ASCII only.

    Raises:
        ValueError: ``obj`` holds NaN or an infinity.
    """
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _could_not_write(path: Path, error: OSError) -> MoonError:
    reason = error.strerror or str(error)
    remedy = _REMEDIES.get(error.errno or 0, "Check the path and the disk")
    return MoonError(f"could not write {path}: {reason}", remedy=remedy)


def _aside(target: Path, suffix: str) -> Path:
    # Process ids repeat (in containers nearly always), so the id alone is not unique.
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.{suffix}")


def _write_aside(target: Path, data: bytes) -> None:
    aside = _aside(target, "tmp")
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, aside)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def _check_replaceable(given: Path, target: Path, force: bool, marker: str | None) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(
            f"{given} exists and is not a folder", remedy="Choose another --out, or move it away"
        )
    if not any(target.iterdir()):
        return
    if not force:
        raise UsageError(f"{given} exists", remedy="Choose another --out or pass --force")
    if marker is not None and not (target / marker).is_file():
        raise UsageError(
            f"{given} holds other files (it has no {marker}), so --force will not replace it",
            remedy="Choose another --out, or empty the folder yourself",
        )


def _flush_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            handle = os.open(Path(folder, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _swap_in(aside: Path, target: Path) -> None:
    if not target.exists():
        aside.rename(target)
    elif _exchange(aside, target):
        shutil.rmtree(aside, ignore_errors=True)
    else:
        old = _aside(target, "old")
        target.rename(old)
        try:
            aside.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one atomic step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, TypeError, AttributeError):
        return False
    names = (os.fsencode(one), os.fsencode(other))
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
