"""The table of a gate's thresholds by predicted class."""

from __future__ import annotations

__all__ = ["show_classes"]

from typing import Any

from rich.console import Console
from rich.markup import escape

from moon.cli.text import grid, percent, rates


def show_classes(console: Console, gate: Any) -> None:
    """Print a row a threshold by class, and which classes share one and why."""
    by_class = gate.per_class
    figures = ("threshold", "images", "rejected here", "true rate, 95%")
    table = grid("predicted as", *figures, right=figures)
    groups = [(name, by_class.own[name]) for name in by_class.classes if name in by_class.own]
    if by_class.pool is not None:
        groups.append(("pooled", by_class.pool))
    for name, group in groups:
        table.add_row(
            escape(name),
            f"{group.value:.6g}",
            f"{group.n:,}",
            percent(group.achieved["reject"]),
            rates(group.achieved["ci95"]),
        )
    console.print(table)
    if by_class.pool is not None:
        named = ", ".join(f"{name} ({n:,})" for name, n in by_class.pooled.items())
        console.print()
        console.print(
            f"Pooled, as a class needs {by_class.fewest:,} images predicted as it: "
            f"{escape(named)}. They share one threshold, and the promise holds for them together.",
            soft_wrap=True,
        )
