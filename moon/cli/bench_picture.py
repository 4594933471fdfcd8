"""Latencies as a picture: how often each came, of everything that was measured in one run."""

from __future__ import annotations

__all__ = ["check_picture", "save_picture"]

import io
from pathlib import Path
from typing import Any

from moon.cli.bench_view import subjects
from moon.errors import UsageError
from moon.files import write_bytes

_MARKS = {"p50": "-", "p90": "--", "p99": ":"}


def check_picture(path: Path) -> str:
    """The format that a picture's ending names.

    Raises:
        UsageError: matplotlib writes no such format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kind = path.suffix.lower().removeprefix(".")
    if kind not in FigureCanvasAgg.filetypes:
        raise UsageError(f"{path} is no kind of picture", remedy="Name it .svg or .png")
    return kind


def save_picture(result: dict[str, Any], path: Path) -> None:
    """Draw a histogram of latencies for each subject, above each other on one scale.

    Both axes are logarithmic: slow queries are few, and many times as slow. Bins differ in
    width, so heights are queries for each percent of latency.

    Raises:
        UsageError: matplotlib writes no such format.
        MoonError: could not be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shown = subjects(result)
    figure = Figure(figsize=(7.5, 1.1 + 1.25 * len(shown)), layout="constrained")
    rows = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, one), color in zip(rows, shown, _colors(len(shown)), strict=True):
        _draw(axes, one, color)
        axes.set_title(_title(name, one), fontsize=9, loc="left")
    last = rows[-1]
    last.set(xscale="log", xlabel="latency (ms)")
    last.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    last.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    last.xaxis.set_minor_formatter(NullFormatter())
    rows[0].legend(loc="upper right", fontsize=8, frameon=False, ncols=len(_MARKS))
    figure.supylabel("queries for each 1% of latency", fontsize=9)
    figure.suptitle(_head(result), fontsize=10)
    data = io.BytesIO()
    figure.savefig(data, format=check_picture(path), dpi=150)
    write_bytes(path, data.getvalue())


def _draw(axes: Any, one: dict[str, Any], color: str) -> None:
    edges = one["latency_histogram"]["edges_ms"]
    steps = zip(one["latency_histogram"]["counts"], edges, edges[1:], strict=False)
    heights = [count / (100 * (high / low - 1)) for count, low, high in steps]
    axes.stairs(heights, edges, fill=True, color=color, alpha=0.75)
    for mark, line in _MARKS.items():
        value = one["latency_ms"][mark]
        axes.axvline(value, linestyle=line, color="0.25", linewidth=1, label=mark)
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)


def _colors(number: int) -> list[str]:
    """The baseline, which comes last, in grey."""
    return [f"C{i}" for i in range(number - 1)] + ["0.6" if number > 1 else "C0"]


def _title(name: str, one: dict[str, Any]) -> str:
    figures = ", ".join(f"{mark} {one['latency_ms'][mark]:.3g}" for mark in _MARKS)
    return f"{name}: {figures} ms"


def _head(result: dict[str, Any]) -> str:
    config = result["config"]
    images = f"{config['samples']} image{'' if config['samples'] == 1 else 's'} a query"
    doubt = "" if result["valid"] else " (not valid)"
    return (
        f"{result['model']['name']}, {config['scenario']}, {images}, "
        f"{config['queries']:,} queries each{doubt}"
    )
