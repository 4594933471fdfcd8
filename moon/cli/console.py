"""What commands write: tables and JSON on stdout, progress and notes on stderr.

With ``--json`` stdout carries one JSON document and nothing else. Progress appears only
when stderr is a terminal.
"""

from __future__ import annotations

__all__ = ["Working", "error_console", "note", "output", "print_json", "working"]

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# A pipe has no width; tables must not be cut there.
PIPE_WIDTH = 160


def output() -> Console:
    """The console on stdout."""
    return _console(sys.stdout)


def error_console() -> Console:
    """The console on stderr, for progress and notes."""
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    known = stream.isatty() or "COLUMNS" in os.environ
    return Console(file=stream, width=None if known else PIPE_WIDTH, highlight=False)


def print_json(document: object) -> None:
    """Print one JSON document on stdout; NaN and infinities are refused."""
    text = json.dumps(document, indent=2, allow_nan=False)
    print(text, flush=True)


def note(text: str) -> None:
    """Print one plain line on stderr."""
    print(f"moon: {text}", file=sys.stderr, flush=True)


class _Count(ProgressColumn):
    """``12/100``, or nothing while the total is unknown."""

    def __init__(self) -> None:
        self._count = MofNCompleteColumn()
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else self._count.render(task)


class Working:
    """A progress callback, ``(done, total, what)``, drawing on stderr or nowhere."""

    def __init__(self, bars: Progress | None, what: str) -> None:
        self._bars = bars
        self._what = what
        self._task = bars.add_task(what, total=None) if bars else None

    def __call__(self, done: int, total: int, what: str) -> None:
        if self._bars is None or self._task is None:
            return
        if what != self._what:
            self._what = what
            self._bars.reset(self._task, description=what, total=total or None)
        self._bars.update(self._task, completed=done, total=total or None)

    def say(self, what: str) -> None:
        """Name a step that cannot be counted."""
        self(0, 0, what)


@contextmanager
def working(what: str) -> Iterator[Working]:
    """Show that something is under way, and how far it is, until the block ends."""
    console = error_console()
    if not console.is_terminal:
        yield Working(None, what)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        _Count(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield Working(bars, what)
