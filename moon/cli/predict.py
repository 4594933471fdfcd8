"""``moon predict``: decide images from the command line."""

from __future__ import annotations

__all__ = ["decide", "predict", "show_predictions"]

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moon.cli.console import note, output, print_json, working
from moon.cli.options import AsJson, Backend, Debug, Key
from moon.cli.text import figure, grid
from moon.errors import ImageError, MoonError
from moon.progress import Progress, silent

_CHUNK = 64


def predict(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A calibrated bundle.")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files.")],
    backend: Backend = "onnxruntime",
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold", metavar="X", help="Accept scores >= X, not the calibrated one."
        ),
    ] = None,
    key: Key = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Give each image a label, or abstain.

    All images are decided; the exit status is 1 when one could not be read.
    """
    from moon.runtime.predictor import Predictor

    with working("Opening the bundle") as progress:
        predictor = Predictor.open(
            bundle, backend=backend, threshold=threshold, key=key, warn=_warn
        )
        entries = decide(predictor, images, progress)
    if as_json:
        manifest = predictor.bundle.manifest
        model = {"name": manifest.name, "version": manifest.version}
        print_json({"model": model, "predictions": entries})
    else:
        show_predictions(output(), entries)
    failed = [entry["error"] for entry in entries if "error" in entry]
    if failed:
        what = "image" if len(images) == 1 else "images"
        which = ":" if len(failed) == 1 else "; the first:"
        others = "The others are decided" if len(failed) < len(images) else ""
        raise MoonError(
            f"{len(failed)} of {len(images)} {what} could not be read{which} {failed[0]}",
            remedy=others,
        )


def decide(
    predictor: Any, images: Sequence[str], progress: Progress = silent
) -> list[dict[str, Any]]:
    """The JSON prediction of each image file, or its error."""
    entries: list[dict[str, Any]] = []
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        progress(start, len(images), "Deciding")
        decided = predictor.predict_each([Path(image) for image in chunk])
        entries += [_entry(*pair) for pair in zip(chunk, decided, strict=True)]
    return entries


def _warn(text: str) -> None:
    note(f"warning: {text}")


def _entry(name: str, decided: Any) -> dict[str, Any]:
    if isinstance(decided, ImageError):
        return {"input": name, "error": str(decided)}
    return {**decided.to_json(), "input": name}


def show_predictions(console: Console, entries: Sequence[dict[str, Any]]) -> None:
    """Print decisions as a table; a failed item is a row of its own."""
    columns = ("input", "decision", "label", "p", "score", "p-value", "why")
    table = grid(*columns, right=("p", "score", "p-value"))
    table.columns[1].no_wrap = True
    for entry in entries:
        name = escape(entry["input"])
        if "error" in entry:
            table.add_row(name, "[red]error[/]")
            continue
        top: dict[str, Any] = entry["top"][0] if entry["top"] else {"label": "-", "p": None}
        accepted = entry["decision"] == "accept"
        table.add_row(
            name,
            "[green]accept[/]" if accepted else "[yellow]abstain[/]",
            escape(entry["label"]) if accepted else f"[dim]({escape(top['label'])}?)[/]",
            figure(top["p"]),
            figure(entry["score"]["value"], 4),
            figure(entry["p_value"], 2),
            (entry["reason"] or "").replace("_", " "),
        )
    console.print(table)
    console.print()
    for entry in entries:
        if "error" in entry:
            text = f"{entry['input']}: {entry['error']}"
            console.print(f"[red]error[/] {escape(text)}", soft_wrap=True)
    scores = [entry["score"] for entry in entries if "score" in entry]
    if scores:
        bars = sorted({score["threshold"] for score in scores})
        several = f"its predicted class's threshold, here {figure(bars[0], 6)} to "
        least = several if len(bars) > 1 else ""
        console.print(f"accept when {scores[0]['name']} >= {least}{figure(bars[-1], 6)}")
