"""Write a finished graph as a bundle, calibrated where there is data, all or nothing."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

import moon
from moon.bundle import Bundle, golden_bytes, write_bundle
from moon.data.fingerprint import TrainingSketch, sketch
from moon.data.items import Source
from moon.data.load import load_pixels
from moon.data.preprocess import Preprocess
from moon.errors import ExportError, MoonError, UsageError
from moon.export.build import Built, Classifier, Options, build
from moon.export.checks import check_agreement
from moon.export.fitting import FIT_LIMIT, FitImages, Fitting, fit_scores
from moon.export.pack import round_values
from moon.export.session import Session
from moon.progress import Progress, silent
from moon.runtime.calibrate import calibrate

__all__ = [
    "GOLDEN",
    "HALF_IMAGES",
    "Description",
    "assemble",
    "check_free",
]

# Enough to catch a wrong channel order or rounding; small enough to carry along.
GOLDEN = 16
# Rates to a tenth of a percent need a thousand images.
HALF_IMAGES = 1000


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


def assemble(
    classifier: Classifier,
    description: Description,
    options: Options,
    out: str | os.PathLike[str],
    *,
    source: Source | None,
    training: Source | None = None,
    fit_limit: int | None = FIT_LIMIT,
    trained_on: TrainingSketch | None = None,
    reject: float = 0.05,
    force: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Build the graph, write the bundle aside, calibrate it, then put it at ``out``.

    Args:
        source: held-out in-distribution images for golden inputs, the fp16 check and the gate;
            None leaves the bundle uncalibrated, its golden inputs random.
        training: the images the model was trained on, to fit scores to; None if not known.
        fit_limit: fit to a random choice of so many of them.
        trained_on: fingerprints of the training images; default those of ``training``, if given.
        reject: share of in-distribution images that may be rejected.

    Raises:
        UsageError: ``out`` exists, or an option is wrong.
        ExportError, ParityError: the model cannot be exported faithfully.
        CalibrationError: too few images for ``reject``; names the smallest number.
    """
    check_free(out, force)
    if source is not None and not len(source):
        raise UsageError(f"{source.spec} holds no images")
    progress(0, 2, "exporting")
    fitting = _fit(
        classifier, description, options, FitImages(training, source, fit_limit), progress
    )
    source = fitting.held_out
    golden = _golden(source, classifier.preprocess)
    built = build(classifier, options, golden, fitting.scores)
    half = _Half.of(built, options, source, classifier) if options.precision == "fp16" else None
    report = dict(built.report)
    if half is not None:
        report["fp16"] = half.check(options.score, None)
    fields = _fields(classifier, description, options, built, report, fitting)
    if trained_on is None and training is not None:
        trained_on = sketch(training, classifier.preprocess)
    files = _files(built, options, classifier.preprocess, golden, trained_on)
    progress(1, 2, "calibrating")
    with _aside(out) as folder:
        bundle = write_bundle(folder / "bundle", manifest_fields=fields, files=files)
        if source is not None:
            bundle = calibrate(
                bundle, source, score=options.score, reject=reject, progress=progress
            )
        gate = bundle.gate()
        if half is not None and gate is not None:
            report["fp16"] = half.check(options.score, gate.threshold)
            fields = _fields(classifier, description, options, built, report, fitting)
        bundle = _move(bundle, fields, out, force)
    progress(2, 2, "exporting")
    return bundle


def _files(
    built: Built,
    options: Options,
    preprocess: Preprocess,
    golden: NDArray[np.uint8],
    trained_on: TrainingSketch | None,
) -> dict[str, bytes]:
    """The bundle's files by name, but for the manifest and the gate."""
    outputs = _outputs(built.model, options, preprocess, golden)
    files = {
        "model.onnx": built.model.SerializeToString(),
        "golden.npz": golden_bytes(golden, outputs),
    }
    if trained_on is not None:
        files["training.json"] = trained_on.to_bytes()
    return files


def _fit(
    classifier: Classifier,
    description: Description,
    options: Options,
    images: FitImages,
    progress: Progress,
) -> Fitting:
    """The scores asked for, fitted to what the weights answer as they will be stored."""
    return fit_scores(
        round_values(classifier.body, options.stored),
        images,
        score=options.score,
        carry=options.carry,
        settings=options.settings,
        classes=description.classes,
        preprocess=classifier.preprocess,
        unknown_index=classifier.unknown_index,
        progress=progress,
    )


@contextmanager
def _aside(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside ``out``, so that the last step is a rename."""
    parent = Path(out).resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=parent, prefix=".moon-export-")
    except OSError as error:
        raise ExportError(
            f"could not write in {parent}: {error.strerror or error}",
            remedy="Choose another --out",
        ) from error
    with folder as name:
        try:
            yield Path(name)
        except MoonError as error:
            # Who reads it knows the folder asked for, not this one.
            error.cause = error.cause.replace(str(Path(name, "bundle")), str(out))
            raise


def check_free(out: str | os.PathLike[str], force: bool) -> None:
    """Refuse an ``out`` that could not be written in the end, before the work and not after.

    Raises:
        UsageError: it exists and may not be replaced.
    """
    path = Path(out)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise UsageError(f"{out} exists", remedy="Choose another --out or pass --force")
    if not (path / "manifest.json").is_file():
        raise UsageError(
            f"{out} is not a bundle, so --force will not replace it", remedy="Choose another --out"
        )


def _move(
    bundle: Bundle, fields: Mapping[str, Any], out: str | os.PathLike[str], force: bool
) -> Bundle:
    files = {name: (bundle.path / name).read_bytes() for name in bundle.manifest.files}
    return write_bundle(out, manifest_fields=fields, files=files, force=force)


def _golden(source: Source | None, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Images spread evenly over the source, or random pixels."""
    if source is None:
        return _noise(preprocess, GOLDEN)
    count = min(GOLDEN, len(source))
    return load_pixels(source, preprocess, np.arange(count) * len(source) // count)


def _half_images(source: Source | None, preprocess: Preprocess) -> NDArray[np.uint8]:
    if source is None:
        return _noise(preprocess, HALF_IMAGES)
    if len(source) < HALF_IMAGES:
        raise ExportError(
            f"an fp16 graph is checked over at least {HALF_IMAGES:,} images, and {source.spec} "
            f"has {len(source):,}",
            remedy="Give more with --data, or export with --precision fp32",
        )
    return load_pixels(source, preprocess, np.arange(HALF_IMAGES) * len(source) // HALF_IMAGES)


def _noise(preprocess: Preprocess, count: int) -> NDArray[np.uint8]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, *preprocess.shape), dtype=np.uint8)


def _outputs(
    model: onnx.ModelProto, options: Options, preprocess: Preprocess, pixels: NDArray[np.uint8]
) -> dict[str, NDArray[Any]]:
    session = Session(model)
    if options.input_dtype == "uint8":
        return session.run_batches("input", pixels)
    # Normalised a batch at a time: the floats of a thousand large images are gigabytes.
    parts = [
        session.run({"input": preprocess.normalise(pixels[i : i + 64])})
        for i in range(0, len(pixels), 64)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class _Half:
    """What the fp16 graph, and the fp32 one with the same weights, give for many images."""

    narrow: Mapping[str, NDArray[Any]]
    wide: Mapping[str, NDArray[Any]]

    @classmethod
    def of(
        cls, built: Built, options: Options, source: Source | None, classifier: Classifier
    ) -> _Half:
        preprocess = classifier.preprocess
        images = _half_images(source, preprocess)
        narrow = _outputs(built.model, options, preprocess, images)
        return cls(narrow, _outputs(built.wide, options, preprocess, images))

    def check(self, score: str, threshold: float | None) -> dict[str, Any]:
        return check_agreement(self.wide, self.narrow, score=score, threshold=threshold)


def _fields(
    classifier: Classifier,
    description: Description,
    options: Options,
    built: Built,
    report: Mapping[str, Any],
    fitting: Fitting,
) -> dict[str, Any]:
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
