"""The ``moon`` command: one file a command, and one place where errors become a line."""

from __future__ import annotations

__all__ = ["main"]

from moon.cli.entry import main
