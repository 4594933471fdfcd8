"""What a bundle is, as figures: shared by inspect, export and demo."""

from __future__ import annotations

__all__ = [
    "bundle_facts",
    "bytes_line",
    "classes_line",
    "gate_facts",
    "layer_rows",
    "plans_line",
    "run_facts",
    "show_layers",
    "total",
]

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moon.cli.text import count, grid, milliseconds, percent, share, size
from moon.errors import TrainingError

_FLOAT_BYTES = 4
# Bytes of a run's layers that releases before this one did not record.
_MEASURED = ("activation_bytes", "saved_bytes", "gradient_bytes", "slot_bytes", "mask_bytes")


def bundle_facts(bundle: Any) -> dict[str, Any]:
    """A bundle's figures as a JSON document.

    ``dense_bytes`` is the size of the same graph with dense float32 weights, or, where the
    export did not record it, four bytes a weight; ``score_bytes`` of it, and of the model, are
    constants of scores. ``flops`` counts a multiply-add as 2, for one input.
    """
    from moon.runtime.sparse.stored import facts as stored_plans
    from moon.runtime.trt.stored import facts as stored_engines

    manifest = bundle.manifest
    export = manifest.provenance.get("export", {})
    rows = layer_rows(
        (name, layer.shape, layer.nonzeros, layer.flops)
        for name, layer in manifest.sparsity.layers.items()
    )
    sums = total(rows)
    files = {path: entry.size for path, entry in manifest.files.items()}
    return {
        "kind": "bundle",
        "path": str(bundle.path),
        "name": manifest.name,
        "version": manifest.version,
        "classes": list(manifest.classes),
        "unknown_index": manifest.unknown_index,
        "input": manifest.input.to_json(),
        "channels": manifest.preprocess.channels,
        "scores": list(manifest.scores),
        "pattern": manifest.sparsity.pattern,
        **sums,
        "model_bytes": files["model.onnx"],
        "dense_bytes": export.get("dense_fp32_bytes") or _FLOAT_BYTES * sums["weights"],
        "score_bytes": export.get("score_bytes", 0),
        "files": files,
        "plans": stored_plans(bundle),
        "engines": stored_engines(bundle),
        "layers": rows,
        "gate": gate_facts(bundle.gate()),
        "provenance": dict(manifest.provenance),
    }


def gate_facts(gate: Any) -> dict[str, Any] | None:
    """A gate's JSON without its thousands of stored scores."""
    facts: dict[str, Any] | None = None if gate is None else gate.to_json(stored=False)
    return facts


def run_facts(run: Path) -> dict[str, Any]:
    """A finished training run's figures, from its checkpoint.json.

    ``memory`` holds the sums over all tensors that the run recorded, null before it did.

    Raises:
        TrainingError: the file is damaged.
    """
    path = run / "checkpoint.json"
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        layers = [
            (layer["name"], layer["shape"], layer["nonzeros"], layer["dense_flops"])
            for layer in plain["layers"]
        ]
        rows = layer_rows(layers)
        for row, layer in zip(rows, plain["layers"], strict=True):
            row.update(_training_row(plain, layer))
        return {
            "kind": "run",
            "path": str(run),
            "name": plain["recipe"]["name"],
            "recipe_sha256": plain["recipe_sha256"],
            "recipe": plain["recipe"],
            "classes": plain["classes"],
            "unknown_index": plain["unknown_index"],
            **total(rows),
            "flops_training": sum(row["flops_training"] for row in rows),
            "memory": plain["metrics"].get("memory"),
            "checkpoint_bytes": plain["file"]["bytes"],
            "layers": rows,
            "gate": None,
            "validation": {
                "source": plain["validation"]["source"],
                "sha256": plain["validation"]["sha256"],
            },
            "metrics": plain["metrics"],
            "versions": plain["versions"],
        }
    except OSError as error:
        raise TrainingError(f"could not read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{path} is not a checkpoint that can be read", remedy="Train the run again"
        ) from error


def _training_row(plain: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's layer has beside a bundle's: bytes, and its share of the training FLOPs."""
    from moon.trainer.accounting.costs import LayerCost, training_flops

    cost = LayerCost(**{**layer, "shape": tuple(layer["shape"])})
    recipe, metrics = plain["recipe"], plain["metrics"]
    return {
        "flops_training": training_flops(
            [cost],
            rule=recipe["rule"],
            examples=metrics["epochs"] * metrics["training_images"],
            interval=recipe["update"]["interval"],
            updating=recipe["update"]["stop"],
        ),
        "dense_bytes": cost.dense_bytes,
        "sparse_bytes": cost.sparse_bytes,
        "sparse_format": cost.sparse_format,
        **{name: getattr(cost, name) for name in _MEASURED},
    }


def classes_line(facts: Mapping[str, Any]) -> str:
    """``10 (cat, dog, ...) and the unknown``."""
    names = facts["classes"]
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    tail = "" if facts["unknown_index"] is None else " and the unknown"
    return escape(f"{len(names)} ({shown}){tail}")


def bytes_line(facts: Mapping[str, Any]) -> str:
    """``120 KB, 6.4% of the dense fp32 graph's 1.9 MB``."""
    constants = facts["score_bytes"]
    small, dense = facts["model_bytes"] - constants, facts["dense_bytes"] - constants
    line = f"{size(small)}, {share(small, dense)} of dense fp32 ({size(dense)})"
    return f"{line}, and {size(constants)} constants of scores" if constants else line


def plans_line(plans: Mapping[str, Any]) -> str:
    """``znver4 avx512, images together: 1, threads: 1: 20 convolutions, 8.4 ms to 8.0 ms, ...``."""
    if "error" in plans:
        return f"{plans['file']}: {plans['error']}"
    times = [milliseconds(plans[f"{name}_ms"]) for name in ("default", "tuned", "onnxruntime")]
    line = (
        f"{plans['cpu']} {plans['isa']}, images together: {plans['together']},"
        f" threads: {plans['threads']}: {plans['plans']} convolutions,"
        f" {times[0]} to {times[1]}, ONNX Runtime {times[2]}"
    )
    return f"{line} (it runs the whole model)" if plans["verdict"] == "onnxruntime" else line


def layer_rows(
    layers: Iterable[tuple[str, Sequence[int], int, int | None]],
) -> list[dict[str, Any]]:
    """A row a weight tensor: shape, weights, nonzeros, density, FLOPs dense and sparse."""
    rows = []
    for name, shape, nonzeros, flops in layers:
        weights = math.prod(shape)
        density = nonzeros / weights
        rows.append(
            {
                "name": name,
                "shape": list(shape),
                "weights": weights,
                "nonzeros": nonzeros,
                "density": density,
                "flops_dense": flops,
                "flops": None if flops is None else round(flops * density),
            }
        )
    return rows


def total(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over the rows of :func:`layer_rows`."""
    weights = sum(row["weights"] for row in rows)
    nonzeros = sum(row["nonzeros"] for row in rows)
    known = bool(rows) and all(row["flops"] is not None for row in rows)
    return {
        "weights": weights,
        "nonzeros": nonzeros,
        "sparsity": 1 - nonzeros / weights if weights else 0.0,
        "flops": sum(row["flops"] for row in rows) if known else None,
        "flops_dense": sum(row["flops_dense"] for row in rows) if known else None,
    }


def show_layers(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the layers with their sum: FLOPs, and of a run the bytes as well."""
    run = bool(rows) and "flops_training" in rows[0]
    figures = ["weights", "nonzeros", "density", "FLOPs", "dense", *["training"] * run]
    table = grid("layer", "shape", *figures, right=figures)
    for row in rows:
        shape = "x".join(str(side) for side in row["shape"])
        table.add_row(escape(row["name"]), shape, *_figures(row))
    sums = total(rows)
    sums["density"] = 1 - sums["sparsity"]
    if run:
        sums["flops_training"] = sum(row["flops_training"] for row in rows)
    table.add_section()
    table.add_row("all", "", *_figures(sums))
    console.print(table)
    if run:
        console.print()
        console.print(_memory_table(rows))


def _figures(row: Mapping[str, Any]) -> list[str]:
    training = [count(row["flops_training"])] if "flops_training" in row else []
    return [
        f"{row['weights']:,}",
        f"{row['nonzeros']:,}",
        percent(row["density"]),
        count(row["flops"]),
        count(row["flops_dense"]),
        *training,
    ]


_MEMORY_COLUMNS = {
    "dense": "dense_bytes",
    "sparse": "sparse_bytes",
    "output": "activation_bytes",
    "kept": "saved_bytes",
    "gradient": "gradient_bytes",
    "optimizer": "slot_bytes",
    "mask": "mask_bytes",
}


def _memory_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Bytes of each layer: its weight, its output and what autograd keeps for an image, and
    what training holds beside the weight. Columns of which nothing is known are left out."""
    columns = {
        title: key
        for title, key in _MEMORY_COLUMNS.items()
        if any(row[key] is not None for row in rows)
    }
    table = grid("bytes", *columns, "format", right=columns)
    for row in rows:
        cells = [size(row[key]) for key in columns.values()]
        table.add_row(escape(row["name"]), *cells, row["sparse_format"])
    sums = [_sum(row[key] for row in rows) for key in columns.values()]
    table.add_section()
    table.add_row("all", *map(size, sums), "")
    return table


def _sum(values: Iterable[int | None]) -> int | None:
    known = list(values)
    return None if None in known else sum(value or 0 for value in known)
