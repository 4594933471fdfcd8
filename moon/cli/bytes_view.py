"""``moon inspect --bytes``: what each layer takes in the file, in which form."""

from __future__ import annotations

__all__ = ["SORTS", "bytes_facts", "show_bytes"]

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from moon.cli.onnx_bytes import model_bytes
from moon.cli.text import grid, share, size
from moon.errors import UsageError

_KEYS = {
    "file": lambda layer: -layer["file_bytes"],
    "dense": lambda layer: -layer["dense_bytes"],
    "share": lambda layer: -layer["share"],
    "density": lambda layer: -layer["density"],
    "name": lambda layer: layer["name"],
}
SORTS = ("graph", *_KEYS)


def bytes_facts(path: Path, sort: str = "graph") -> dict[str, Any]:
    """Bytes of a bundle's model.onnx, or of an ONNX file, layer by layer, as JSON.

    Args:
        sort: "graph" for the order of the graph, or "file", "dense", "share", "density" (largest
            first), "name".

    Raises:
        UsageError: no such order.
        BundleError, BackendError: the model cannot be read, or not unpacked.
    """
    if sort not in SORTS:
        raise UsageError(f"--sort {sort!r} is none of {', '.join(SORTS)}")
    from moon.export.layer_bytes import file_bytes

    found = file_bytes(model_bytes(path))
    layers = []
    for layer in found.layers:
        part = layer.file_bytes / layer.dense_bytes
        density = layer.nonzeros / math.prod(layer.shape)
        layers.append({**layer.to_json(), "density": density, "share": part})
    if sort in _KEYS:
        layers.sort(key=_KEYS[sort])
    return {
        "kind": "bytes",
        "path": str(path),
        "sort": sort,
        "layers": layers,
        "layer_bytes": sum(layer["file_bytes"] for layer in layers),
        "layer_dense_bytes": sum(layer["dense_bytes"] for layer in layers),
        "rest_bytes": found.rest_bytes,
        "score_bytes": found.score_bytes,
        "file_bytes": found.file_bytes,
        "dense_bytes": found.dense_bytes,
    }


def show_bytes(console: Console, facts: dict[str, Any]) -> None:
    """Print the layers, what is beside them, and the sum."""
    figures = ("density", "values in file", "index", "in file", "dense fp32", "share")
    table = grid("layer", "shape", "density", "form", "values", *figures[1:], right=figures)
    for layer in facts["layers"]:
        table.add_row(
            escape(layer["name"]),
            "x".join(map(str, layer["shape"])),
            share(layer["density"], 1),
            layer["form"],
            layer["values"],
            size(layer["value_bytes"]),
            size(layer["index_bytes"]),
            *_sizes(layer["file_bytes"], layer["dense_bytes"]),
        )
    blank = [""] * 6
    table.add_section()
    table.add_row("layers", *blank, *_sizes(facts["layer_bytes"], facts["layer_dense_bytes"]))
    table.add_row("biases, operators, names", *blank, size(facts["rest_bytes"]), "", "")
    if facts["score_bytes"]:
        table.add_row("constants of scores", *blank, size(facts["score_bytes"]), "", "")
    table.add_row("all", *blank, *_sizes(facts["file_bytes"], facts["dense_bytes"]))
    console.print(f"[bold]{escape(facts['path'])}[/]", soft_wrap=True)
    console.print()
    console.print(table)


def _sizes(file: int, dense: int) -> tuple[str, str, str]:
    return size(file), size(dense), share(file, dense)
