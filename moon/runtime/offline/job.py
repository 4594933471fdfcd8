"""What is to be decided, cut into parts, and which of them are done.

    scores.parquet.parts/
        job.json            what the parts are of; another job cannot go on with them
        000000.part ...     each a Parquet file of so many rows, written aside and renamed

The folder lies beside the table until this is complete, so whoever is stopped goes on later, and
several machines that see the folder can work at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moon.data.items import Source
from moon.data.spec import parse
from moon.errors import MoonError, UsageError
from moon.files import write_json
from moon.runtime.offline.rows import CHUNK, Row

__all__ = ["PART", "Job", "Parts", "folder_of", "identity", "part_path", "schema", "write_part"]

PART = 16 * CHUNK
_SCHEMA_VERSION = 1
_WRITE = "Check the path, its rights and the space on its disk"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker has to know; small, plain, and the same on every machine.

    Attributes:
        home: the folder that relative names begin at.
        bundle: its folder.
        model: the hash of its manifest, so that no worker runs another one.
        source: as it was written.
        images: how many there are.
        listing: hash of the images' names, and of sizes and times of change of their files.
        backend: name.
        threads: for one inference.
        threshold: given instead of the calibrated one.
        probabilities: columns for them are wanted.
        columns: names and types.
        part: images of one.
    """

    home: str
    bundle: str
    model: str
    source: str
    images: int
    listing: str
    backend: str
    threads: int
    threshold: float | None
    probabilities: bool
    columns: Mapping[str, str]
    part: int = PART

    @property
    def parts(self) -> int:
        """How many there are."""
        return -(-self.images // self.part)

    def positions(self, part: int) -> range:
        """Of the images of a part."""
        return range(part * self.part, min((part + 1) * self.part, self.images))

    @property
    def key(self) -> dict[str, Any]:
        """What must be equal for parts to be of the same table; where things lie need not."""
        return {
            "schema_version": _SCHEMA_VERSION,
            "model": self.model,
            "source": self.source,
            "images": self.images,
            "listing": self.listing,
            "backend": self.backend,
            "threshold": self.threshold,
            "columns": dict(self.columns),
            "part": self.part,
        }


def identity(images: Source) -> str:
    """Hash of what a source lists: names, and of files their sizes and times of change."""
    digest = hashlib.sha256(_stat(Path(parse(images.spec).base).expanduser()))
    files = len(images) > 0 and isinstance(images.item(0), Path)
    for i in range(len(images)):
        digest.update(images.name(i).encode() + b"\0")
        if files:
            item = images.item(i)
            digest.update(_stat(item) if isinstance(item, Path) else b"")
    return digest.hexdigest()


def _stat(path: Path) -> bytes:
    """Size and time of change of a file; nothing of what is none, or not there."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return b""
    return f"{found.st_size} {found.st_mtime_ns}".encode() if path.is_file() else b""


class Parts:
    """The folder of parts of a table, for one process in a ``with`` block.

    Args:
        out: the table's file.
        job: what it is of.
        restart: throw away parts of another job, or of this one.

    Raises:
        UsageError: there are parts of another job, or another process is at work on them.
        MoonError: the folder cannot be made.
    """

    def __init__(self, out: Path, job: Job, *, restart: bool = False) -> None:
        self._out, self._job = out.resolve(), job
        self.folder, self._shown = folder_of(self._out), folder_of(out)
        with _writing(out):
            if restart and self._marker.is_file():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
        if self._marker.exists():
            self._check_same()
        elif any(self.folder.iterdir()):
            raise UsageError(
                f"{self._shown} exists and is not of moon score",
                remedy="Move it away, or choose another --out",
            )
        else:
            write_json(self._marker, job.key)
        self._lock = self._locked()

    @property
    def _marker(self) -> Path:
        return self.folder / "job.json"

    def _check_same(self) -> None:
        try:
            there = json.loads(self._marker.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            there = None
        if not isinstance(there, dict):
            raise UsageError(
                f"{self._marker} is damaged", remedy="Pass --restart to begin again without it"
            )
        key = self._job.key
        differing = sorted(name for name in {*key, *there} if key.get(name) != there.get(name))
        if differing:
            raise UsageError(
                f"{self._shown} holds parts of another table: {', '.join(differing)} differ",
                remedy="Finish that one, choose another --out, or pass --restart to throw it away",
            )

    def _locked(self) -> Any:
        """Held as long as this process lives, where the system knows such locks."""
        try:
            import fcntl
        except ImportError:
            return None
        file = self._marker.open("rb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UsageError(
                f"another moon score is writing {self._out.name}",
                remedy="Wait for it, or choose another --out",
            ) from None
        except OSError:  # a file system without locks
            pass
        return file

    @property
    def done(self) -> set[int]:
        """Numbers of the parts that are there."""
        names = (path.stem for path in self.folder.glob("*.part"))
        return {int(name) for name in names if name.isdecimal() and int(name) < self._job.parts}

    @property
    def missing(self) -> list[int]:
        """Numbers of the parts that are not."""
        return sorted(set(range(self._job.parts)) - self.done)

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        """Others may go on from here; a folder in which nothing is done is removed."""
        if not self.done:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def join(self) -> Iterator[Any]:
        """Make the table of all parts, and remove these.

        Yields:
            Every part as a ``pyarrow.Table``, when it has been written.

        Raises:
            MoonError: a part is damaged, or the table cannot be written; the parts stay.
        """
        from pyarrow import parquet

        aside = _aside(self._out)
        try:
            with _writing(self._out), aside.open("xb") as file:
                with parquet.ParquetWriter(file, schema(self._job.columns)) as writer:
                    for part in range(self._job.parts):
                        table = self._read(part)
                        writer.write_table(table)
                        yield table
                file.flush()
                os.fsync(file.fileno())
            with _writing(self._out):
                aside.replace(self._out)
        finally:
            aside.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, part: int) -> Any:
        from pyarrow import ArrowException, parquet

        path = part_path(self.folder, part)
        try:
            table = parquet.read_table(path, schema=schema(self._job.columns))
            whole = len(table) == len(self._job.positions(part))
        except (ArrowException, OSError, ValueError):
            whole = False
        if not whole:
            with suppress(OSError):
                path.unlink()
            raise MoonError(
                f"{self._shown / path.name} was damaged, and is removed",
                remedy="Run the same command again: it makes that part anew",
            )
        return table


def folder_of(out: Path) -> Path:
    """Where the parts of a table lie until it is complete."""
    return out.with_name(f"{out.name}.parts")


def write_part(folder: Path, job: Job, part: int, found: list[Row]) -> None:
    """Write the rows of a part; it is there as a whole or not at all.

    Raises:
        MoonError: it cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    target = part_path(folder, part)
    aside = _aside(target)
    try:
        with _writing(target), aside.open("xb") as file:
            parquet.write_table(pyarrow.Table.from_pylist(found, schema(job.columns)), file)
            file.flush()
            os.fsync(file.fileno())
        with _writing(target):
            aside.replace(target)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def part_path(folder: Path, part: int) -> Path:
    """Where a part lies."""
    return folder / f"{part:06}.part"


def schema(table: Mapping[str, str]) -> Any:
    """Columns as pyarrow has them."""
    import pyarrow

    return pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in table.items()])


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MoonError(
            f"could not write {path}: {error.strerror or error}", remedy=_WRITE
        ) from error
