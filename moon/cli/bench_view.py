"""How results of ``moon bench`` look in a terminal."""

from __future__ import annotations

__all__ = ["check_picture", "save_picture", "show_bench", "show_comparison"]

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from moon.cli.text import grid, milliseconds, on_cpu_line, percent, size
from moon.errors import UsageError
from moon.files import write_bytes

_FIGURES = ("min", "mean", "p50", "p90", "p95", "p99", "max")
_BLOCKS = " ▁▂▃▄▅▆▇█"


def show_bench(console: Console, result: dict[str, Any]) -> None:
    """Print a result: latency of each subject, the speed-up, and what puts it in doubt."""
    model, config, host = result["model"], result["config"], result["host"]
    sparse = f"{percent(model['sparsity'])} sparse, model.onnx {size(model['bytes'])}"
    console.print(f"[bold]{escape(model['name'])}[/]  {sparse}")
    console.print(
        f"scenario {config['scenario']}, images a query: {config['samples']}, "
        f"threads: {config['threads'] or 'all'}, {config['queries']:,} queries each, "
        f"interleaved, {escape(str(host['cpu']))}\n"
    )
    subjects = _subjects(result)
    table = grid("ms", *(name for name, _ in subjects), right=[name for name, _ in subjects])
    for figure in _FIGURES:
        table.add_row(figure, *(_plain(one["latency_ms"][figure]) for _, one in subjects))
    table.add_section()
    table.add_row("load", *(_plain(one["load_ms"]) for _, one in subjects))
    for when in ("cold", "warm"):
        table.add_row(
            f"first, {when}", *(_plain(one["first_inference_ms"][when]) for _, one in subjects)
        )
    table.add_row("images/s", *(f"{one['throughput']:,.0f}" for _, one in subjects))
    table.add_row("drift", *(f"{one['drift']:+.1%}" for _, one in subjects))
    table.add_row(
        "log spread", *(_spark(one["latency_histogram"]["counts"]) for _, one in subjects)
    )
    console.print(table)
    console.print()
    for name, one in subjects:
        if one.get("speedup"):
            console.print(_speedup(name, one["speedup"], result["baseline"]["name"]))
    for name, one in subjects:
        if one["backend"].get("handed_over"):
            line = f"{name} hands over to ONNX Runtime: {one['backend']['handed_over']}"
            console.print(line, soft_wrap=True, markup=False)
        if line := on_cpu_line(one["backend"]):
            console.print(f"{name}: {line}", soft_wrap=True, markup=False)
    _show_validity(console, result)


def show_comparison(console: Console, result: dict[str, Any]) -> None:
    """Print two results side by side."""
    names = [f"{side.upper()} {result[side]['model']['name']}" for side in ("a", "b")]
    table = grid("ms", *names, "A / B", right=(*names, "A / B"))
    for figure in _FIGURES:
        pair = result["latency_ms"][figure]
        table.add_row(figure, _plain(pair["a"]), _plain(pair["b"]), f"{pair['ratio']:.3g}")
    pair = result["throughput"]
    table.add_row("images/s", f"{pair['a']:,.0f}", f"{pair['b']:,.0f}", f"{pair['ratio']:.3g}")
    console.print(table)
    console.print()
    console.print(_speedup("B", result["speedup"], "A"))
    if result["comparable"]:
        console.print("[green]comparable[/]: measured alike, on like machines, both valid")
        return
    reasons = [
        *result["differences"],
        *(f"{side.upper()} is not valid" for side in result["invalid"]),
    ]
    for reason in reasons:
        console.print(f"[yellow]not comparable[/]: {escape(reason)}")


def _subjects(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    subjects = [(_name(result), result), *((_name(other), other) for other in result["others"])]
    if result["baseline"] is not None:
        name = result["baseline"]["name"]
        subjects.append((f"{name} (baseline)", result["baseline"]))
    return subjects


def _name(subject: dict[str, Any]) -> str:
    return str(subject["backend"]["name"])


def _plain(value: float) -> str:
    return milliseconds(value).removesuffix(" ms")


def _speedup(name: str, speedup: dict[str, Any], baseline: str) -> str:
    ratio, ci95 = speedup["ratio"], "{:.2f} to {:.2f}".format(*speedup["ci95"])
    return f"{name} is [bold]{ratio:.2f}[/] times as fast as {baseline}, 95% interval {ci95}"


def _spark(counts: Sequence[int]) -> str:
    """Counts as a line of blocks, every other bin joined to its neighbour."""
    joined = [sum(counts[i : i + 2]) for i in range(0, len(counts), 2)]
    top = max(joined) or 1
    return "".join(_BLOCKS[-(-count * (len(_BLOCKS) - 1) // top)] for count in joined)


def _show_validity(console: Console, result: dict[str, Any]) -> None:
    if result["valid"]:
        console.print("[green]valid[/]: enough queries, no drift, a quiet host")
    for warning in result["warnings"]:
        console.print(f"[yellow]not valid[/]: {escape(warning)}")


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
    """Draw the histograms of latency, in the format that the file's ending names.

    Raises:
        UsageError: matplotlib writes no such format.
        MoonError: could not be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, one in _subjects(result):
        histogram = one["latency_histogram"]
        axes.stairs(histogram["counts"], histogram["edges_ms"], label=name, fill=True, alpha=0.5)
    axes.set(xscale="log", xlabel="latency (ms)", ylabel="queries", title=result["model"]["name"])
    axes.legend()
    data = io.BytesIO()
    figure.savefig(data, format=check_picture(path))
    write_bytes(path, data.getvalue())
