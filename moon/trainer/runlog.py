"""The folder of a run: its recipe, its progress, and what it needs to go on after a kill.

recipe.toml      complete, as run
metrics.jsonl    one line an epoch
log.txt          what happened when
last/state.pt    all state at the end of the last whole epoch, replaced atomically
"""

from __future__ import annotations

import io
import json
import os
import pickle
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from moon.errors import MoonError, TrainingError, UsageError
from moon.files import write_bytes, write_text
from moon.trainer.checkpoint import FACTS, TENSORS
from moon.trainer.recipe import Recipe

__all__ = ["RunFolder", "parse_state"]

RECIPE = "recipe.toml"
METRICS = "metrics.jsonl"
LOG = "log.txt"
LAST = "last"
STATE = "state.pt"
OWN = frozenset({RECIPE, METRICS, LOG, LAST, FACTS, TENSORS})


class RunFolder:
    """An open run, locked against a second process until closed. Use as a context manager.

    Args:
        path: the folder; made where it is missing.
        recipe: resolved.
        resume: go on with the run that is there, or start where there is none.

    Raises:
        UsageError: the folder holds a run and ``resume`` is not given, holds other files, is
            the run of another recipe, or is in use.
        MoonError: could not be written.
    """

    def __init__(self, path: str | os.PathLike[str], recipe: Recipe, *, resume: bool) -> None:
        self.path = Path(path)
        self.check(path, recipe, resume=resume)
        self._log = self._open_log()
        try:
            _lock(self._log, self.path)
            write_text(self.path / RECIPE, recipe.to_toml())
        except BaseException:
            self._log.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()

    @staticmethod
    def check(path: str | os.PathLike[str], recipe: Recipe, *, resume: bool) -> bool:
        """Whether a finished run is there, before anything is made or locked.

        A run that has not come to the end of an epoch has nothing to lose: it may be
        started anew, with any recipe.

        Raises:
            UsageError: as of the class.
        """
        folder = Path(path)
        _check_folder(folder)
        finished = (folder / FACTS).is_file()
        if finished or (folder / LAST / STATE).exists():
            if not resume:
                raise UsageError(
                    f"{folder} already holds a run",
                    remedy="Go on with it by --resume, or choose another --out",
                )
            _check_same(folder, recipe)
        return finished

    def log(self, text: str) -> None:
        """Append a line with the time to log.txt."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            self._log.write(f"{stamp} {text}\n")
            self._log.flush()
        except OSError as error:
            raise _unwritten(self.path / LOG, error) from error

    def save(self, state: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Replace last/, then metrics.jsonl by ``history``, each atomically.

        ``state`` holds tensors and plain values only.
        """
        buffer = io.BytesIO()
        torch.save({**state, "history": list(history)}, buffer)
        write_bytes(self.path / LAST / STATE, buffer.getvalue())
        self.write_metrics(history)

    def write_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in history]
        write_text(self.path / METRICS, "".join(lines))

    def read(self) -> bytes | None:
        """What ``save`` stored last, for ``parse_state``, or None before the first epoch's end.

        Raises:
            TrainingError: it cannot be read.
        """
        path = self.path / LAST / STATE
        try:
            return path.read_bytes() if path.exists() else None
        except OSError as error:
            raise _damaged(path, error) from error

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """What ``save`` stored last, or None before the first epoch's end.

        Raises:
            TrainingError: it is damaged.
        """
        data = self.read()
        return None if data is None else parse_state(data, device, self.path)

    def _open_log(self) -> TextIO:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return (self.path / LOG).open("a", encoding="utf-8")
        except OSError as error:
            raise _unwritten(self.path, error) from error


def parse_state(data: bytes, device: torch.device, run: str | os.PathLike[str]) -> dict[str, Any]:
    """The state in ``data``, as ``RunFolder.read`` gave it, with its tensors on ``device``.

    Raises:
        TrainingError: it is damaged; names it as that of the folder ``run``.
    """
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(Path(run) / LAST / STATE, error) from error
    return state


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file", remedy="Choose another --out")
    names = {entry.name for entry in folder.iterdir()}
    foreign = sorted(name for name in names - OWN if not _is_leftover(name))
    if foreign and RECIPE not in names:
        raise UsageError(
            f"{folder} holds other files, such as {foreign[0]}", remedy="Choose another --out"
        )


def _check_same(folder: Path, recipe: Recipe) -> None:
    there = Recipe.load(folder / RECIPE)
    if there.hash == recipe.hash:
        return
    before, now = _flat(there.resolved().to_dict()), _flat(recipe.to_dict())
    changed = [key for key in sorted({*before, *now} - {"name"}) if before.get(key) != now.get(key)]
    key = changed[0] if changed else "something"
    raise UsageError(
        f"{folder} is a run of another recipe: {key} is {before.get(key)} there "
        f"and {now.get(key)} here",
        remedy=f"Resume with {folder / RECIPE}, or choose another --out",
    )


def _lock(log: TextIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: without the protection.
        return
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"another process is training in {path}", remedy="Wait for it, or choose another --out"
        ) from error
    except OSError:
        return  # A file system without locks.


def _is_leftover(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _damaged(path: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"cannot resume from {path}: {error}", remedy="Start again with another --out"
    )


def _unwritten(path: Path, error: OSError) -> MoonError:
    reason = error.strerror or str(error)
    return MoonError(f"could not write {path}: {reason}", remedy="Check the path and the disk")


def _flat(table: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{where}{key}.")
        else:
            flat[where + key] = value
    return flat
