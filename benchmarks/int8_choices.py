"""What int8 changes in a model's answers, as moon export does it and by other choices.

    python benchmarks/int8_choices.py FP32.moon --train SOURCE --test SOURCE --unknown SOURCE

The bundle is one exported in fp32. Ranges are measured on 512 of the images of --train; accuracy,
the share of the same labels, the share of the same decisions (each graph by its own conformal
threshold for 5%) and the AUROC of ebo are over --limit images of --test and --unknown.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime.quantization
from numpy.typing import NDArray
from onnx import ModelProto, load_model_from_string
from onnxruntime.quantization import CalibrationMethod, quantize_static
from rich.console import Console
from rich.table import Table

from moon.bundle import Bundle
from moon.data.labels import known_labels
from moon.data.load import load_pixels
from moon.data.preprocess import Preprocess
from moon.data.source import open_source
from moon.evaluation.metrics import auroc
from moon.export.graph import prune
from moon.export.head import add_head
from moon.export.int8 import to_int8
from moon.export.session import Session
from moon.gate_calibration import calibrate_conformal
from moon.runtime.unpack import dense_model

Floats = NDArray[np.float32]
Outputs = Mapping[str, NDArray[Any]]

PERCENTILE = {"calibrate_method": CalibrationMethod.Percentile}
CHOICES: dict[str, dict[str, Any]] = {
    "as exported": {},
    "first layer fp32": {"first": False},
    "asymmetric": {"extra": {"ActivationSymmetric": False}},
    "percentile 99.99": {**PERCENTILE, "extra": {"CalibPercentile": 99.99}},
    "percentile 99.999": {**PERCENTILE, "extra": {"CalibPercentile": 99.999}},
    "entropy": {"calibrate_method": CalibrationMethod.Entropy},
}


def body_of(bundle: Bundle) -> ModelProto:
    """What computes the logits, its weights plain."""
    model = load_model_from_string(dense_model(bundle.model_bytes()))
    for values, wanted in ((model.graph.output, "logits"), (model.graph.input, "input")):
        kept = next(value for value in values if value.name == wanted)
        copy = type(kept).FromString(kept.SerializeToString())
        del values[:]
        values.append(copy)
    prune(model)
    return model


def quantised(body: ModelProto, batches: list[Floats], choice: Mapping[str, Any]) -> ModelProto:
    first = next(node.name for node in body.graph.node if node.op_type == "Conv")

    def chosen(*given: Any, **options: Any) -> None:
        options["extra_options"] = {**options["extra_options"], **choice.get("extra", {})}
        if not choice.get("first", True):
            options["nodes_to_exclude"] = [*options["nodes_to_exclude"], first]
        if "calibrate_method" in choice:
            options["calibrate_method"] = choice["calibrate_method"]
        quantize_static(*given, **options)

    # Ranges are joined only where zero points agree, as they do when all is symmetric.
    joined = "moon.export.int8._join_ranges"
    symmetric = choice.get("extra", {}).get("ActivationSymmetric", True)
    with mock.patch.object(onnxruntime.quantization, "quantize_static", chosen):
        if symmetric:
            return to_int8(body, batches)
        with mock.patch(joined, lambda model: None):
            return to_int8(body, batches)


def answers(body: ModelProto, bundle: Bundle, images: Floats) -> Outputs:
    unknown = bundle.manifest.unknown_index
    whole = add_head(body, outputs=bundle.manifest.logits, unknown_index=unknown)
    return Session(whole, threads=0).run_batches("input", images)


def images(source: str, preprocess: Preprocess, limit: int) -> tuple[Floats, NDArray[np.int64]]:
    opened = open_source(source)
    count = min(limit, len(opened))
    rows = np.sort(np.random.default_rng(0).permutation(len(opened))[:count])
    return preprocess.normalise(load_pixels(opened, preprocess, rows)), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    for name in ("train", "test", "unknown"):
        parser.add_argument(f"--{name}", required=True, metavar="SOURCE")
    parser.add_argument("--limit", type=int, default=2000)
    given = parser.parse_args()
    bundle = Bundle.open(given.bundle)
    preprocess, classes = bundle.preprocess, bundle.manifest.classes
    fitted, _ = images(given.train, preprocess, 512)
    known, rows = images(given.test, preprocess, given.limit)
    unknown, _ = images(given.unknown, preprocess, given.limit)
    labels = known_labels(open_source(given.test), rows, classes)
    body = body_of(bundle)
    wide = answers(body, bundle, known)
    table = Table(title=f"{bundle.manifest.name}, {len(known):,} images, int8 against fp32")
    for column in ("", "accuracy", "same labels", "same decisions", "AUROC of ebo"):
        table.add_column(column, justify="right" if column else "left")

    def row(name: str, graph: ModelProto) -> None:
        found, far = answers(graph, bundle, known), answers(graph, bundle, unknown)
        accepts = [
            one["score"] >= calibrate_conformal(one["score"], 0.05).threshold
            for one in (wide, found)
        ]
        right = (found["label"] == labels).mean() if labels is not None else np.nan
        shares = (
            right,
            (found["label"] == wide["label"]).mean(),
            (accepts[0] == accepts[1]).mean(),
            auroc(found["score"], far["score"]),
        )
        table.add_row(name, *(f"{share:.2%}" for share in shares))

    row("fp32", body)
    batches = [fitted[i : i + 32] for i in range(0, len(fitted), 32)]
    for name, choice in CHOICES.items():
        row(name, quantised(body, batches, choice))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
