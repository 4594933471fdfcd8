"""``moon inspect --engine``: what each layer takes in the sparse CPU engine."""

from __future__ import annotations

__all__ = ["engine_facts", "images_line", "show_engine"]

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from moon.cli.console import note
from moon.cli.text import figure, grid, percent, share

_RUNS = 50
_SUMS = {
    "convolutions": "convolutions",
    "linear": "linear layers",
    "other": "other layers",
    "frames": "frames before and after",
    "onnxruntime": "ONNX Runtime",
    "between": "handing over, copies and checks",
}


def engine_facts(path: Path, *, threads: int, batch: int, isa: str) -> dict[str, Any]:
    """A profile of a bundle or an ONNX file, as JSON.

    Raises:
        UsageError: an argument is out of range.
        BundleError: the bundle is damaged.
        BackendError, MissingExtraError: the model cannot be run here.
    """
    from moon.runtime.sparse.engine import SparseEngine
    from moon.runtime.sparse.sample import sample

    options: dict[str, Any] = {"threads": threads, "isa": isa, "warn": _warn}
    tuned: list[int] = []
    if path.is_dir():
        from moon.bundle import Bundle
        from moon.runtime.sparse.stored import find

        bundle = Bundle.open(path)
        model = bundle.model_bytes()
        tuning, passed_over = find(bundle, model, isa)
        if passed_over:
            _warn(passed_over)
        tuned = [] if tuning is None else sorted(tuning.batches)
        engine = SparseEngine(model, tuning=tuning, **options)
    else:
        engine = SparseEngine(path, **options)
    try:
        profile = engine.profile(sample(engine, batch), runs=_RUNS)
    finally:
        engine.close()
    return {"kind": "engine", "path": str(path), "tuned_batches": tuned, **profile.to_json()}


def _warn(text: str) -> None:
    note(f"warning: {text}")


def show_engine(console: Console, facts: dict[str, Any]) -> None:
    """Print the layers in order, and where the time goes."""
    console.print(_head(facts), soft_wrap=True)
    if facts["layers"]:
        console.print()
        _show_layers(console, facts)
    console.print()
    times = facts["times"]
    sums = grid("time", "µs", "share", right=("µs", "share"))
    for key, title in _SUMS.items():
        if times[key]:
            sums.add_row(title, f"{times[key]:,.0f}", share(times[key], times["total"]))
    sums.add_section()
    sums.add_row("all", f"{times['total']:,.0f}", "")
    console.print(sums)
    if facts["handed_over"]:
        console.print()
        line = f"ONNX Runtime runs {facts['handed_over']}"
        console.print(line, soft_wrap=True, markup=False)


def _head(facts: dict[str, Any]) -> str:
    words = [images_line(facts["images"], facts["together"]), f"threads: {facts['threads']}"]
    if facts["isa"]:
        words.append(f"{facts['isa']}, at most {facts['limit_gmacs']:.1f} GMAC/s a core")
    plans = "tuned plans" if facts["together"] in facts["tuned_batches"] else ""
    return f"[bold]{escape(facts['path'])}[/]  " + ", ".join([*words, *filter(None, [plans])])


def images_line(images: int, together: int) -> str:
    """``images: 8, 4 at a time``."""
    return f"images: {images}" + (f", {together} at a time" if 0 < together < images else "")


def _show_layers(console: Console, facts: dict[str, Any]) -> None:
    right = ("density", "tile", "rows", "µs", "GMAC/s", "limit")
    table = grid(
        "layer", "kind", "shape", "density", "reading", "tile", "rows", "beside", "µs", "GMAC/s",
        "limit", right=right,
    )  # fmt: skip
    for layer in facts["layers"]:
        plan = layer["plan"] or {"reading": "", "tile": "", "together": ""}
        beside = [name for name in layer["kernels"] if not name.startswith("conv_")]
        table.add_row(
            escape(layer["name"].rpartition(" (")[0]),
            layer["kind"],
            layer["shape"],
            "" if layer["density"] is None else percent(layer["density"]),
            str(plan["reading"]),
            str(plan["tile"]),
            str(plan["together"]),
            " ".join(beside) if layer["plan"] else "",
            f"{layer['us']:,.1f}",
            "" if layer["gmacs"] is None else figure(layer["gmacs"]),
            "" if layer["gmacs"] is None else percent(layer["share_of_limit"], 0),
        )
    console.print(table)
