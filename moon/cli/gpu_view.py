"""``moon inspect --gpu``: which layers the sparse kernels of a GPU can run."""

from __future__ import annotations

__all__ = ["gpu_facts", "model_bytes", "show_gpu"]

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from moon.cli.text import grid, share
from moon.errors import BackendError


def model_bytes(path: Path) -> bytes:
    """The ONNX file of a bundle, checked, or the file itself with the data beside it.

    Raises:
        BundleError: the bundle is damaged.
        BackendError: the file cannot be read, or what belongs to it.
    """
    if path.is_dir():
        from moon.bundle import Bundle

        return Bundle.open(path).model_bytes()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BackendError(f"could not read {path}: {error.strerror}") from error
    return _whole(path, data)


def _whole(path: Path, data: bytes) -> bytes:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx.external_data_helper import load_external_data_for_model, uses_external_data

    try:
        model = onnx.load_model_from_string(data)
    except DecodeError:
        return data  # for who reads it to say
    if not any(map(uses_external_data, model.graph.initializer)):
        return data
    try:
        load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise BackendError(
            f"weights of {path.name} lie in another file that could not be read: {error}",
            remedy=f"Put it beside {path.name}, as the exporter wrote it",
        ) from error
    for tensor in model.graph.initializer:
        tensor.ClearField("data_location")  # two bytes that no other model has
    whole: bytes = model.SerializeToString()
    return whole


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
