"""What a manifest says of an exported model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx

import moon
from moon.export.build import Built, Classifier, Options
from moon.export.fitting import Fitting

__all__ = ["Description", "manifest_fields"]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the manifest says beyond the graph.

    Args:
        name: the model's name.
        classes: known classes, in logit order.
        provenance: where the model comes from; any JSON object.
        flops: dense forward FLOPs of a layer by name, where known.
        pattern: "unstructured" or the name of a structure; decided from the weights when None.
    """

    name: str
    classes: tuple[str, ...]
    provenance: Mapping[str, Any]
    flops: Mapping[str, int]
    pattern: str | None = None


def manifest_fields(
    classifier: Classifier,
    description: Description,
    options: Options,
    built: Built,
    report: Mapping[str, Any],
    fitting: Fitting,
) -> dict[str, Any]:
    """The manifest's own fields, as `moon.bundle.write_bundle` takes them.

    Args:
        report: figures of the checks.
    """
    preprocess = classifier.preprocess
    return {
        "name": description.name,
        "classes": list(description.classes),
        "unknown_index": classifier.unknown_index,
        "input": {
            "name": "input",
            "dtype": options.input_dtype,
            "layout": "NHWC" if options.input_dtype == "uint8" else "NCHW",
            "size": list(preprocess.crop),
        },
        "preprocess": preprocess.to_json(),
        "outputs": [value.name for value in built.model.graph.output],
        "scores": list(built.scores),
        "sparsity": _sparsity(built, description),
        "provenance": {
            **description.provenance,
            "export": {
                "weights": options.weights,
                "values": options.stored,
                "precision": options.precision,
                "bytes": built.model.ByteSize(),
                "dense_fp32_bytes": built.dense_bytes,
                "score_bytes": built.score_bytes,
                "parity": dict(report),
                "fitted": dict(fitting.record),
                "left_out": dict(fitting.left_out),
                "tools": {"moon": moon.__version__, "onnx": onnx.__version__},
            },
        },
    }


def _sparsity(built: Built, description: Description) -> dict[str, Any]:
    layers = {name: dict(layer) for name, layer in built.layers.items()}
    for name in layers.keys() & description.flops.keys():
        layers[name]["flops"] = description.flops[name]
    total = sum(math.prod(layer["shape"]) for layer in layers.values())
    nonzeros = sum(layer["nonzeros"] for layer in layers.values())
    pattern = "unstructured" if nonzeros < total else "dense"
    return {
        "global": 1 - nonzeros / total if total else 0.0,
        "layers": layers,
        "pattern": description.pattern or pattern,
    }
