"""``moon bench --tune``: plans for this CPU, measured and put into the bundle."""

from __future__ import annotations

__all__ = ["show_tuning", "tune_bundle"]

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from moon.cli.engine_view import images_line
from moon.cli.text import figure, grid, milliseconds


def tune_bundle(
    path: Path, *, threads: int, batch: int, budget: float, progress: Any
) -> dict[str, Any]:
    """Tune a bundle in place; what was found, as JSON.

    Raises:
        UsageError: the sparse engine does not run it.
        BundleError: it is damaged, or was replaced meanwhile.
    """
    from moon.bundle import Bundle
    from moon.runtime.sparse.stored import store
    from moon.runtime.sparse.tune import tune
    from moon.runtime.sparse.tuning import file_name

    bundle = Bundle.open(path)
    tuning = tune(
        bundle.model_bytes(), threads=threads, batch=batch, budget=budget, progress=progress
    )
    written = store(bundle, tuning)
    ((images, tuned),) = tuning.batches.items()
    times = tuned.measured.to_json()
    return {
        "schema_version": 1,
        "bundle": str(path),
        "version": written.manifest.version,
        "file": file_name(tuning.target.cpu, tuning.target.isa),
        "cpu": tuning.target.cpu,
        "isa": tuning.target.isa,
        "batch": batch,
        "together": images,
        "threads": tuned.threads,
        "verdict": tuned.verdict,
        "speedup": times["default_ms"] / times["tuned_ms"],
        "measured": times,
        "plans": {name: dict(plan) for name, plan in sorted(tuned.plans.items())},
    }


def show_tuning(console: Console, result: dict[str, Any]) -> None:
    """Print layers that got another plan, and what is faster as a whole."""
    measured, plans = result["measured"], result["plans"]
    layers = measured["layers_us"]
    better = {name: pair for name, pair in layers.items() if pair[0] != pair[1]}
    if better:
        figures = ("before", "after", "tile", "rows")
        table = grid("layer, µs", *figures, "reading", "block", right=(*figures, "block"))
        for name, (before, after) in better.items():
            plan = plans[name]
            numbers = (f"{before:,.0f}", f"{after:,.0f}", str(plan["tile"]), str(plan["together"]))
            table.add_row(escape(name), *numbers, plan["reading"], str(plan["block"]))
        console.print(table)
        console.print()
    console.print(f"{len(better)} of {len(layers)} convolutions are faster done in another way")
    before, after = measured["default_ms"], measured["tuned_ms"]
    console.print(
        f"{milliseconds(before)} before, {milliseconds(after)} after"
        f" ({after / before - 1:+.1%}), {images_line(result['batch'], result['together'])},"
        f" threads: {result['threads']}"
    )
    other = measured["onnxruntime_ms"]
    if other is None:
        console.print("ONNX Runtime refuses the model")
    elif result["verdict"] == "onnxruntime":
        console.print(
            f"ONNX Runtime takes {milliseconds(other)}: --backend sparse hands it the whole model"
        )
    else:
        console.print(
            f"ONNX Runtime takes {milliseconds(other)}, {figure(other / after)} times as long"
        )
    console.print(f"[green]written[/]: {escape(result['bundle'])}/{result['file']}")
