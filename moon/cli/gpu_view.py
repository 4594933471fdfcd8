"""``moon inspect --gpu``: which layers the sparse kernels of a GPU can run."""

from __future__ import annotations

__all__ = ["gpu_facts", "show_gpu"]

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from moon.cli.onnx_bytes import model_bytes
from moon.cli.text import grid, share


def gpu_facts(path: Path) -> dict[str, Any]:
    """The layers of a bundle or an ONNX file, judged by the 2:4 rule, as JSON.

    Raises:
        BundleError, BackendError: the model cannot be read, or not unpacked.
    """
    from moon.export.trt.sparsity import lint, verdict

    layers = lint(model_bytes(path))
    return {
        "kind": "gpu",
        "path": str(path),
        "layers": [layer.to_json() for layer in layers],
        "eligible": sum(layer.eligible for layer in layers),
        "worth": sum(layer.worth for layer in layers),
        "verdict": verdict(layers),
    }


def show_gpu(console: Console, facts: dict[str, Any]) -> None:
    """Print the layers in order, why each is eligible or not, and what to expect."""
    table = grid("layer", "operator", "shape", "density", "2:4", "why", right=("density",))
    for layer in facts["layers"]:
        word = ("yes" if layer["worth"] else "too narrow") if layer["eligible"] else "no"
        table.add_row(
            escape(layer["weight"]),
            layer["op"],
            "x".join(map(str, layer["shape"])),
            share(layer["nonzeros"], math.prod(layer["shape"])),
            word,
            layer["why"],
        )
    console.print(f"[bold]{escape(facts['path'])}[/]", soft_wrap=True)
    console.print()
    if facts["layers"]:
        console.print(table)
        console.print()
    console.print(facts["verdict"], soft_wrap=True, markup=False)
