"""Write a finished graph as a bundle, calibrated where there is data, all or nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from moon.bundle import Bundle, golden_bytes, write_bundle
from moon.data.fingerprint import TrainingSketch, sketch
from moon.data.items import Source
from moon.data.preprocess import Preprocess
from moon.data.training_file import FittedSketch, TrainingFile
from moon.errors import ExportError, MoonError, UsageError
from moon.export.build import Built, Classifier, Options, build
from moon.export.fit_images import FIT_LIMIT, TRAINING, FitImages
from moon.export.fitting import Fitting, fit_scores
from moon.export.int8 import to_int8
from moon.export.int8_check import Int8Answers
from moon.export.pack import round_values
from moon.export.parity import Comparing, Sample, check_backends, check_sample, run_backends
from moon.export.ranges import RangeImages
from moon.export.record import Description, manifest_fields
from moon.export.samples import golden_images, outputs
from moon.export.score_errors import ScoreError
from moon.export.trt.engine import add_engine
from moon.export.trt.request import EngineRequest, choose
from moon.progress import Progress, silent
from moon.runtime.calibrate import calibrate

__all__ = ["assemble", "check_free"]

COMPARING = Comparing()


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
    engine: EngineRequest | None = None,
    comparing: Comparing = COMPARING,
    progress: Progress = silent,
) -> Bundle:
    """Build the graph, write the bundle aside, calibrate it, then put it at ``out``.

    Args:
        source: held-out in-distribution images for golden inputs, the comparison with the model
            and the gate; None leaves the bundle uncalibrated, its golden inputs random.
        training: the images the model was trained on, to fit scores to; None if not known.
        fit_limit: fit to a random choice of so many of them.
        trained_on: fingerprints of the training images; default those of ``training``, if given.
        reject: share of in-distribution images that may be rejected.
        engine: a TensorRT engine to build as well; without it there is no bundle either.
        comparing: how every backend that can run here is compared with the model.

    Raises:
        UsageError: ``out`` exists, or an option is wrong.
        ExportError, ParityError: the model cannot be exported faithfully, or the engine not built.
        MissingExtraError, BackendError: the engine cannot be built here; raised before the work.
        CalibrationError: too few images for ``reject``; names the smallest number.
    """
    check_free(out, force)
    if source is not None and not len(source):
        raise UsageError(f"{source.spec} holds no images")
    if engine is not None:
        choose(engine)
    progress(0, 2, "exporting")
    ranges = RangeImages.choose(training, source) if options.precision == "int8" else None
    body = round_values(classifier.body, options.stored)
    if ranges is not None:
        body, source = to_int8(body, ranges.batches(classifier.preprocess)), ranges.held_out
    images = FitImages(training, source, fit_limit)
    fitting = _fit(classifier, description, options, body, images, progress)
    fitting, golden, built = _build(classifier, options, fitting, body)
    source = fitting.held_out
    sample = Sample.of(classifier, options, built, source, fitting.scores, comparing, progress)
    report = {**built.report, **check_sample(sample, classifier, options, built)}
    if ranges is not None:
        fitting = fitting.also(ranges.of_scores(built.scores))
        report["int8"] = _check_int8(built, options, description, classifier, source, reject)
        report["int8"]["ranges"] = ranges.to_json()
    fields = manifest_fields(classifier, description, options, built, report, fitting)
    seen = _seen(fitting, classifier.preprocess, trained_on)
    files = _files(built, options, classifier.preprocess, golden, seen)
    with _aside(out) as folder:
        bundle = write_bundle(folder / "bundle", manifest_fields=fields, files=files)
        ran = run_backends(bundle, sample, comparing, progress)
        progress(1, 2, "calibrating")
        if source is not None:
            bundle = calibrate(
                bundle, source, score=options.score, reject=reject, progress=progress
            )
        report |= check_backends(ran, bundle, sample, comparing, str(out))
        fields = manifest_fields(classifier, description, options, built, report, fitting)
        if engine is not None:
            bundle, _ = add_engine(bundle, engine, images=source, progress=progress)
        bundle = _move(bundle, fields, out, force)
    progress(2, 2, "exporting")
    return bundle


def _build(
    classifier: Classifier, options: Options, fitting: Fitting, body: ModelProto
) -> tuple[Fitting, NDArray[np.uint8], Built]:
    """The graph, and the golden images it was checked on.

    A score that only "all" asked for and that the graph cannot carry after all is left out.
    """
    while True:
        golden = golden_images(fitting.held_out, classifier.preprocess)
        try:
            int8 = body if options.precision == "int8" else None
            return fitting, golden, build(classifier, options, golden, fitting.scores, int8=int8)
        except ScoreError as error:
            asked = error.score in (options.score, *options.carry)
            if asked or error.score not in fitting.record:
                raise
            fitting = fitting.without(error.score, error.cause)


def _check_int8(
    built: Built,
    options: Options,
    description: Description,
    classifier: Classifier,
    source: Source | None,
    reject: float,
) -> dict[str, Any]:
    if source is None:
        raise ExportError("an int8 graph is checked on held-out images, and none are left")
    answers = Int8Answers.of(built, options, source, classifier.preprocess, description.classes)
    return answers.check(reject, options.max_change)


def _seen(
    fitting: Fitting, preprocess: Preprocess, trained_on: TrainingSketch | None
) -> TrainingFile:
    """Sketches of the images trained on, and of others that scores were fitted to."""
    training = fitting.images.training
    own = None if training is None else sketch(training, preprocess)
    known = own if trained_on is None else trained_on
    return TrainingFile(
        known,
        tuple(
            FittedSketch(one.scores, sketch(one.source, preprocess, one.rows))
            for one in fitting.fitted_to
            if one.part != TRAINING or own != known
        ),
    )


def _files(
    built: Built,
    options: Options,
    preprocess: Preprocess,
    golden: NDArray[np.uint8],
    seen: TrainingFile,
) -> dict[str, bytes]:
    """The bundle's files by name, but for the manifest and the gate."""
    found = outputs(built.model, options, preprocess, golden)
    files = {
        "model.onnx": built.model.SerializeToString(),
        "golden.npz": golden_bytes(golden, found),
    }
    training = seen.to_bytes()
    if training is not None:
        files["training.json"] = training
    return files


def _fit(
    classifier: Classifier,
    description: Description,
    options: Options,
    body: ModelProto,
    images: FitImages,
    progress: Progress,
) -> Fitting:
    """The scores asked for, fitted to what the weights answer as they will be stored."""
    return fit_scores(
        body,
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
