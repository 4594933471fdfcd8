"""The table of how a gate's score was chosen."""

from __future__ import annotations

__all__ = ["show_choice"]

from typing import Any

from rich.console import Console
from rich.markup import escape

from moon.cli.text import grid, percent

_GROUPS = ("near", "far", "given")
_WIDEST = 24


def show_choice(console: Console, choice: Any) -> None:
    """Print the scores compared, best first, and why one was chosen."""
    groups = [
        (group, [one for one in choice.ood if one.group == group and one.counted])
        for group in _GROUPS
    ]
    groups = [(group, sets) for group, sets in groups if sets]
    if [group for group, _ in groups] == ["given"] and len(groups[0][1]) > 1:
        groups = [(_shortened(one.name), [one]) for one in groups[0][1]]
    columns = ["AUROC", *(escape(group) for group, _ in groups), "behind the best, 95%"]
    if [group for group, _ in groups] == ["given"]:
        columns.pop(1)
        groups = []
    table = grid("score", *columns, "", right=columns)
    for one in choice.candidates:
        # Rounded first, and 0.0 added, so that no "-0.00" is shown.
        low, high = (round(100 * value, 2) + 0.0 for value in one.behind_ci95)
        first = one is choice.candidates[0]
        table.add_row(
            escape(one.score),
            percent(one.auroc, 2),
            *(percent(sum(one.sets[s.name] for s in sets) / len(sets)) for _, sets in groups),
            "-" if first else f"{low:.2f} to {high:.2f}",
            "chosen" if one.score == choice.score else "as good" if one.tied else "",
        )
    console.print(table)
    console.print()
    against = ", ".join(f"{_shortened(one.name)} ({one.n:,})" for one in choice.ood if one.counted)
    made = any(one.group != "given" for one in choice.ood)
    kind = "images made from them" if made else "out-of-distribution images"
    console.print(
        f"Compared by {choice.n:,} images, which do not calibrate, against {kind}: "
        f"{escape(against)}.",
        soft_wrap=True,
    )
    console.print(escape(choice.reason), soft_wrap=True)
    console.print()


def _shortened(name: str) -> str:
    name = name.rsplit("/", 1)[-1]
    return name if len(name) <= _WIDEST else "..." + name[3 - _WIDEST :]
