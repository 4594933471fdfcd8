"""The tables of benchmarks/training.py."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show(result: dict[str, Any]) -> None:
    console = Console(width=120)
    given, place = result["options"], result["environment"]
    table = Table(
        title=f"{given['model']}, batch {given['batch']}, {given['sparsity']:.1%} sparse, "
        f"{given['rule']}, {given['structure']}: a step beside the dense loop's"
    )
    for column in ("loop", "step", "beside dense", "95% interval", "with updates", "with votes"):
        table.add_column(column, justify="left" if column == "loop" else "right")
    table.add_column("a run in all", justify="right")
    table.add_row("dense", milliseconds(result["step_seconds"]["dense"]))
    for name, phases in result["in_all"].items():
        steps, *others = (change(phase["ratio"]) for phase in phases.values())
        low, high = map(change, phases["steps"]["ci95"])
        taken = milliseconds(result["step_seconds"][name])
        table.add_row(name, taken, steps, f"{low} to {high}", *others)
    console.print(table)
    table = Table(title="where it goes")
    for column in ("part", "takes", "of the dense step, spread", "when"):
        table.add_column(column, justify="right" if column[0] in "to" else "left")
    for name, part in result["parts"].items():
        table.add_row(name, milliseconds(part["seconds"]), change(part["share"]), part["when"])
    console.print(table)
    if result["whole_step"]:
        console.print(whole_table(result["whole_step"], given))
    for how, variants in (result["memory"] or {}).items():
        console.print(memory_table(how, variants))
    other = place["disturbance"]["other_cpu"]
    console.print(
        f"{place.get('gpu') or place['cpu']}, {place['threads']} threads, torch {place['torch']}, "
        f"{given['rounds']} rounds, {given['clock']} clock; other processes used "
        f"{'an unknown share' if other is None else f'{other:.0%}'} of the cores"
    )


def memory_table(how: str, variants: dict[str, Any]) -> Table:
    """Peaks, and what of them outlives a step."""
    table = Table(title=f"peak memory in MB, by {how}; to its right what outlives a step")
    live = list(variants["dense"]["live_bytes"])
    for column in ("loop", "peak", "ratio", "voting", "ratio", "account", *live):
        table.add_column(column, justify="left" if column == "loop" else "right", no_wrap=True)
    dense = variants["dense"]["peak_bytes"]
    for name, found in variants.items():
        peaks = [found["peak_bytes"], *([found["peak_voting_bytes"]] * (name != "dense"))]
        cells = [cell for peak in peaks for cell in (megabytes(peak), f"{peak / dense:.3f}")]
        cells += [""] * (4 - len(cells))
        rest = [found["accounted_bytes"], *(found["live_bytes"][key] for key in live)]
        table.add_row(name, *cells, *map(megabytes, rest))
    return table


def whole_table(found: dict[str, Any], given: dict[str, Any]) -> Table:
    table = Table(title=f"the whole step of moon train, and {given['epochs']} epochs of it")
    columns = ("path", "step", "mean with updates", f"{given['images']:,} images an epoch", "note")
    for column in columns:
        table.add_column(column, justify="left" if column in ("path", "note") else "right")
    for name, row in found.items():
        run = f"{row['run_seconds'] / 60:.1f} min"
        step, mean = milliseconds(row["step_seconds"]), milliseconds(row["mean_seconds"])
        table.add_row(name, step, mean, run, "; ".join(row["notes"]))
    return table


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}"


def milliseconds(value: float) -> str:
    return f"{1e3 * value:.3f} ms" if value < 0.1 else f"{1e3 * value:.0f} ms"


def change(value: float) -> str:
    """A ratio of 1.0123, or a share of 0.0123, as +1.23%."""
    return f"{100 * (value - 1 if value > 0.5 else value):+.2f}%"
