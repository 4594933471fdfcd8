"""Exports that are killed half-way, for test_bad_input.py: a process of its own.

Each export is a fork, because only a process can be killed; torch keeps to one thread,
which makes that safe.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moon.cli import main as command

__all__ = ["killed_at", "main"]

# The bundle is written aside, calibrated there and then written to its place: each time as
# files one by one, which are flushed, and a folder that is renamed.
SPOTS = (("write", 3), ("rename", 2), ("renamed", 2))


def killed_at(folder: Path) -> dict[str, Path]:
    """Where each export writes, by where it is killed."""
    return {f"{spot} {number}": folder / f"{spot}-{number}.moon" for spot, number in SPOTS}


def main() -> None:
    """``RUN FOLDER``: prints the exit status of each export, the signal's number negated."""
    import torch

    from moon.export.to_bundle import trace
    from moon.trainer.checkpoint import Checkpoint

    torch.set_num_threads(1)
    run, folder = sys.argv[1], Path(sys.argv[2])
    # What takes seconds the first time is done before the forks.
    trace(Checkpoint.load(run).model(), channels=1, size=(8, 8))
    statuses = {}
    for (spot, number), out in zip(SPOTS, killed_at(folder).values(), strict=True):
        child = os.fork()
        if not child:
            _arm(spot, number)
            os._exit(command(["export", run, "--out", str(out)]))
        statuses[f"{spot} {number}"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(statuses))


def _arm(spot: str, number: int) -> None:
    owner: Any = os if spot == "flush" else Path
    name = {"write": "write_bytes", "flush": "fsync"}.get(spot, "rename")
    setattr(owner, name, _counted(getattr(owner, name), number, after=spot == "renamed"))


def _counted(inner: Callable[..., Any], number: int, *, after: bool) -> Callable[..., Any]:
    """``inner``, whose ``number``-th call kills the process, before or after its work."""
    count = 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        result = inner(*args, **options) if after or count < number else None
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call
