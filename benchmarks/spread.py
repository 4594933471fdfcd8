"""Tables of means and standard deviations over seeds, for a terminal and in Markdown."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import moon
from moon.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table whose first columns are text, and the notes under it."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default=())
    texts: int = 1

    def show(self) -> None:
        # Not the terminal's width, so that a table in a file is whole.
        console = Console(width=200)
        table = Table(title=self.title, title_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i < self.texts else "right")
        for row in self.rows:
            table.add_row(*row)
        console.print(table, markup=False)
        for note in self.notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)

    def markdown(self) -> str:
        marks = ["---" if i < self.texts else "---:" for i in range(len(self.columns))]
        lines = [f"| {' | '.join(cells)} |" for cells in (self.columns, marks, *self.rows)]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"**{self.title}**", "", *lines, "", *notes]) + "\n"


def summary(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1; None of one value) and n of the values there are."""
    there = [value for value in values if value is not None]
    return {
        "n": len(there),
        "mean": statistics.fmean(there) if there else None,
        "sd": statistics.stdev(there) if len(there) > 1 else None,
        "values": there,
    }


def shown(figure: Mapping[str, Any], *, scale: float = 100, digits: int = 2) -> str:
    """`90.12±0.31`, without the second where there is one value, `-` where there is none."""
    if figure["mean"] is None:
        return "-"
    mean = f"{scale * figure['mean']:.{digits}f}"
    return mean if figure["sd"] is None else f"{mean}±{scale * figure['sd']:.{digits}f}"


def figures(results: list[dict]) -> dict[str, Any]:
    """Accuracy, ECE, and near and far AUROC by score, as of ``summary``."""
    scores = dict.fromkeys(name for result in results for name in result["scores"])
    return {
        "accuracy": summary([r["id"]["accuracy"] for r in results]),
        "ece": summary([r["id"]["ece"] for r in results]),
        "scores": {
            name: {
                group: summary(
                    [(r["scores"].get(name, {}).get(group) or {}).get("auroc") for r in results]
                )
                for group in ("near", "far")
            }
            for name in scores
        },
    }


def seeds(text: str, option: str = "--seeds") -> list[int]:
    """``0,1,2``, each once."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(words)) != len(words):
        raise UsageError(
            f"{option} {text!r} is no list of different numbers", remedy=f"Write {option} 0,1,2"
        )
    return [int(word) for word in words]


def environment() -> dict[str, str]:
    """Of the machine that prints the table."""
    import numpy
    import torch

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "moon": moon.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cpu": _cpu(),
        "cuda": cuda,
    }


def environment_note(results: Sequence[Mapping[str, Any]]) -> str:
    """This machine, and what the results were trained on."""
    here = environment()
    on = sorted({result["model"]["versions"].get("device", "?") for result in results})
    with_torch = sorted({result["model"]["versions"].get("torch", "?") for result in results})
    trained = f"trained on {', '.join(on)} with torch {', '.join(with_torch)}; " if on else ""
    facts = ", ".join(f"{name} {value}" for name, value in here.items() if value != "none")
    return f"{trained}table made with {facts}"


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return f"{names[0]} x{len(names)}" if names else platform.machine()
