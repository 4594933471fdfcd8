"""The demo's folder: its own earlier output is replaced, anybody else's files never are."""

from __future__ import annotations

__all__ = ["MARKER", "DemoFolder"]

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moon.errors import MoonError, UsageError
from moon.files import write_json

MARKER = "demo.json"


class DemoFolder:
    """An empty place at ``path`` for one demo, and a record of what it writes there.

    The marker ``demo.json`` lists every file, and the part being written just now, which is
    the demo's own whatever it holds; so a demo that was interrupted can be run again.

    Raises:
        UsageError: ``path`` is a file, or holds files that no demo wrote.
        MoonError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: list[str] = []
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file", remedy="Choose another --out")
        if path.is_dir() and any(path.iterdir()):
            self._clear()
        self._mark(None)

    @contextmanager
    def part(self, name: str) -> Iterator[Path]:
        """Write one file or folder called ``name`` within the block."""
        self._mark(name)
        yield self.path / name
        self._files += [file.relative_to(self.path).as_posix() for file in _files(self.path / name)]
        self._mark(None)

    def finish(self, document: dict[str, Any]) -> None:
        """Record the result in the marker."""
        self._mark(None, document)

    def _mark(self, doing: str | None, document: dict[str, Any] | None = None) -> None:
        plain = {"moon_demo": 1, "doing": doing, "files": self._files, "result": document}
        write_json(self.path / MARKER, plain)

    def _clear(self) -> None:
        listed, doing = self._earlier()
        doomed = {self.path / name for name in listed} | {self.path / MARKER}
        mine = self.path / doing if doing else None
        for file in _files(self.path):
            if file not in doomed and (mine is None or mine not in (file, *file.parents)):
                raise UsageError(
                    f"{self.path} holds {file.relative_to(self.path)}, which no demo wrote",
                    remedy="Move it away, or choose another --out",
                )
        try:
            for entry in sorted(self.path.iterdir()):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name != MARKER:
                    entry.unlink()
        except OSError as error:
            raise MoonError(
                f"could not remove an earlier demo from {self.path}: {error.strerror}",
                remedy="Remove it yourself, or choose another --out",
            ) from error

    def _earlier(self) -> tuple[list[str], str | None]:
        try:
            plain = json.loads((self.path / MARKER).read_text(encoding="utf-8"))
            if plain["moon_demo"] == 1:
                return [str(name) for name in plain["files"]], plain["doing"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not a demo's marker: the remedy below
        raise UsageError(
            f"{self.path} holds files that are not a demo's", remedy="Choose another --out"
        )


def _files(root: Path) -> Iterator[Path]:
    """``root`` if it is no folder, else every file and link below it."""
    if root.is_symlink() or root.is_file():
        yield root
    elif root.is_dir():
        for entry in sorted(root.iterdir()):
            yield from _files(entry)
