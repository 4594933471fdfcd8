"""A trained checkpoint as a bundle: traced, folded, packed, checked, calibrated."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle
from moon.data.fingerprint import TrainingSketch, sketch
from moon.data.items import Source
from moon.data.load import data_sha256
from moon.data.source import open_source
from moon.errors import DataError, ExportError, ImageError, MissingExtraError, UsageError
from moon.export.assemble import assemble, check_free
from moon.export.build import Classifier, InputType, Options
from moon.export.fit_images import FIT_LIMIT
from moon.export.fit_settings import asked_scores
from moon.export.foreign import from_onnx
from moon.export.pack import Precision, Values, Weights
from moon.export.parity import Comparing
from moon.export.record import Description
from moon.export.trace import trace
from moon.export.trt.request import EngineRequest, wanted
from moon.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moon.trainer.checkpoint import Checkpoint

__all__ = ["from_onnx", "to_bundle"]


def to_bundle(
    checkpoint_or_run: Checkpoint | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    data: str | Source | None = None,
    name: str | None = None,
    reject: float = 0.05,
    force: bool = False,
    trt: EngineRequest | bool = False,
    weights: Weights = "compact",
    values: Values = "fp32",
    precision: Precision = "fp32",
    max_change: float = 0.02,
    score: str = "ebo",
    carry: Sequence[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    p_values: bool = False,
    fit: str | Source | None = None,
    fit_limit: int | None = FIT_LIMIT,
    input_dtype: InputType = "float32",
    features: bool = False,
    comparing: Comparing | None = None,
    progress: Progress = silent,
) -> Bundle:
    """Write a checkpoint as a bundle and calibrate it.

    Args:
        checkpoint_or_run: a Checkpoint, or the folder of a run.
        out: folder to write.
        data: held-out in-distribution images for calibration, golden inputs and checks; default
            the validation split the run recorded.
        name: of the model; default the recipe's.
        reject: share of in-distribution images that may be rejected.
        force: replace a bundle that is there.
        trt: a TensorRT engine too: which, or True for fp16 on the GPU at hand.
        fit: the images the model was trained on, for scores that are fitted to them; default
            the run's training images.
        fit_limit: fit to a random choice of so many of these images; None for all.
        weights, values, precision, max_change, score, carry, settings, p_values, input_dtype,
            features: see `Options`.
        comparing: how the bundle is compared with the model; see `Comparing`.

    Raises:
        UsageError: ``out`` exists, or an option is wrong.
        DataError: the recorded validation images are gone or have changed.
        ExportError, ParityError: the model cannot be exported faithfully.
        CalibrationError: too few images for ``reject``; names the smallest number.
    """
    check_free(out, force)
    options = Options(
        weights=weights,
        values=values,
        precision=precision,
        max_change=max_change,
        score=score,
        carry=tuple(carry),
        settings=settings or {},
        p_values=p_values,
        input_dtype=input_dtype,
        features=features,
    )
    checkpoint = _checkpoint(checkpoint_or_run)
    source = _source(checkpoint, data)
    fitting = asked_scores(score, carry)
    ranges = precision == "int8"
    if fit is not None and not fitting and not ranges:
        raise UsageError(
            "training images are given, and no score is fitted to any",
            remedy="Leave --fit out, or name a score with --carry",
        )
    training = _training(checkpoint, fit, needed=bool(fitting)) if fitting or ranges else None
    model = checkpoint.model()
    preprocess = checkpoint.preprocess
    classifier = Classifier(
        body=trace(model, channels=preprocess.channels, size=preprocess.crop),
        reference=_reference(model),
        preprocess=preprocess,
        outputs=checkpoint.outputs,
        unknown_index=checkpoint.unknown_index,
        masks=_masks(checkpoint.masks),
    )
    return assemble(
        classifier,
        _description(checkpoint, name or checkpoint.recipe.name),
        options,
        out,
        source=source,
        training=training,
        fit_limit=fit_limit,
        trained_on=_trained_on(checkpoint),
        reject=reject,
        force=force,
        engine=wanted(trt),
        comparing=Comparing() if comparing is None else comparing,
        progress=progress,
    )


def _checkpoint(given: Checkpoint | str | os.PathLike[str]) -> Checkpoint:
    if not isinstance(given, str | os.PathLike):
        return given
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("torch", "train", "exporting a trained model") from error
    from moon.trainer.checkpoint import Checkpoint

    return Checkpoint.load(given)


def _source(checkpoint: Checkpoint, data: str | Source | None) -> Source:
    """The images to calibrate on: those given, else the recorded validation split.

    Raises:
        DataError: the recorded images are gone or are not the same any more.
    """
    if data is not None:
        return open_source(data) if isinstance(data, str) else data
    recorded = checkpoint.validation
    try:
        source = open_source(recorded.source)
        found = data_sha256(source, recorded.indices)
    except DataError as error:
        raise DataError(
            f"the run's validation images cannot be read: {error.cause}",
            remedy="Give held-out images with --data",
        ) from error
    if found != recorded.sha256:
        raise DataError(
            f"the validation images in {recorded.source} have changed since training",
            remedy="Give held-out images with --data",
        )
    return source if recorded.indices is None else source.select(recorded.indices)


def _training(checkpoint: Checkpoint, fit: str | Source | None, *, needed: bool) -> Source | None:
    """The images to fit scores to: those given, else those the run was trained on.

    Args:
        needed: held-out images would not do.

    Raises:
        DataError: they cannot be read here.
    """
    if fit is not None:
        return open_source(fit) if isinstance(fit, str) else fit
    from moon.trainer.dataset import training_source

    try:
        return training_source(checkpoint.recipe)
    except DataError as error:
        if not needed:
            return None
        raise DataError(
            f"the run's training images, to fit the score to, cannot be read: {error.cause}",
            remedy="Give them with --fit",
        ) from error


def _trained_on(checkpoint: Checkpoint) -> TrainingSketch | None:
    """Fingerprints of the training images, made now for a run of before there were any.

    None where the images are not at hand any more: an export does not fail for them.
    """
    if checkpoint.training is not None:
        return checkpoint.training
    from moon.trainer.dataset import training_source

    try:
        return sketch(training_source(checkpoint.recipe), checkpoint.preprocess)
    except (DataError, ImageError):
        return None


def _reference(model: nn.Module) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    import torch

    def logits(images_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        starts = range(0, len(images_NCHW), 64)
        try:
            with torch.inference_mode():
                parts = [model(torch.from_numpy(images_NCHW[i : i + 64])).numpy() for i in starts]
        except RuntimeError as error:
            raise ExportError(
                f"the model does not run with {min(64, len(images_NCHW))} images: {error}",
                remedy="Use a model that takes any batch size",
            ) from error
        return np.concatenate(parts)

    return logits


def _masks(masks: Mapping[str, Tensor]) -> dict[str, NDArray[np.bool_]]:
    return {name: mask.numpy() for name, mask in masks.items()}


def _description(checkpoint: Checkpoint, name: str) -> Description:
    recipe = checkpoint.recipe
    provenance = {
        "recipe": recipe.to_dict(),
        "recipe_sha256": recipe.hash,
        "metrics": dict(checkpoint.metrics),
        "validation": {
            "source": checkpoint.validation.source,
            "sha256": checkpoint.validation.sha256,
        },
        "tools": dict(checkpoint.versions),
    }
    return Description(
        name=name,
        classes=checkpoint.classes,
        provenance=provenance,
        flops={row.name: row.dense_flops for row in checkpoint.layers},
        pattern=recipe.structure if checkpoint.masks else "dense",
    )
