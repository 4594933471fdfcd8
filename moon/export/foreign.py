"""One's own ONNX classifier as a bundle."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle
from moon.data.items import Source
from moon.data.preprocess import Interpolation, Preprocess
from moon.data.source import open_source
from moon.errors import UsageError
from moon.export.assemble import assemble, check_free
from moon.export.build import Classifier, InputType, Options
from moon.export.fit_images import FIT_LIMIT
from moon.export.intake import Foreign, read_foreign
from moon.export.pack import Precision, Values, Weights
from moon.export.parity import Comparing
from moon.export.record import Description
from moon.export.session import Session
from moon.export.trt.request import EngineRequest, wanted
from moon.files import sha256_file
from moon.progress import Progress, silent

__all__ = ["from_onnx"]


def from_onnx(
    model_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    unknown_index: int | None = None,
    data: str | Source | None = None,
    size: tuple[int, int] | None = None,
    resize: int | None = None,
    interpolation: Interpolation = "bilinear",
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
    """Write an ONNX classifier as a bundle.

    Args:
        model_path: one input float32 [N, C, H, W], one output logits [N, L].
        out: folder to write.
        classes: names of the known classes in logit order; a name for the unknown class may be
            among them at ``unknown_index`` and is left out.
        mean, std: of the pixels in [0, 1], a value a channel, or one for all.
        unknown_index: which logit is the unknown class, or None.
        data: held-out in-distribution images; None leaves the bundle uncalibrated.
        size: (H, W), for a model that leaves these free.
        resize: shorter side before the centre crop; default the crop's longer side.
        interpolation: how images are resized.
        name: of the model; default the file's.
        reject: share of in-distribution images that may be rejected.
        force: replace a bundle that is there.
        trt: a TensorRT engine too: which, or True for fp16 on the GPU at hand.
        fit: the images the model was trained on, for scores that are fitted to them.
        fit_limit: fit to a random choice of so many of these images; None for all.
        weights, values, precision, max_change, score, carry, settings, p_values, input_dtype,
            features: see `Options`.
        comparing: how the bundle is compared with the model; see `Comparing`.

    Raises:
        UsageError, ExportError, ParityError, CalibrationError: see `assemble`; also when
        ``classes`` does not fit the model's outputs.
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
    path = Path(model_path)
    foreign = read_foreign(path, size=size)
    preprocess = Preprocess(
        crop=foreign.size,
        resize=max(foreign.size) if resize is None else resize,
        mean=_channels("mean", mean, foreign.channels),
        std=_channels("std", std, foreign.channels),
        interpolation=interpolation,
    )
    known = _known(classes, foreign.outputs, unknown_index)
    source = open_source(data) if isinstance(data, str) else data
    training = open_source(fit) if isinstance(fit, str) else fit
    return assemble(
        _classifier(foreign, preprocess, unknown_index),
        _description(foreign, path, name, known),
        options,
        out,
        source=source,
        training=training,
        fit_limit=fit_limit,
        reject=reject,
        force=force,
        engine=wanted(trt),
        comparing=Comparing() if comparing is None else comparing,
        progress=progress,
    )


def _classifier(foreign: Foreign, preprocess: Preprocess, unknown_index: int | None) -> Classifier:
    return Classifier(
        body=foreign.body,
        reference=_Original(foreign),
        preprocess=preprocess,
        outputs=foreign.outputs,
        unknown_index=unknown_index,
        masks={},
        origin="the ONNX file in ONNX Runtime",
    )


def _description(
    foreign: Foreign, path: Path, name: str | None, classes: tuple[str, ...]
) -> Description:
    source = {"file": path.name, "sha256": sha256_file(path), "removed": foreign.removed}
    return Description(
        name=name or path.stem, classes=classes, provenance={"source": source}, flops={}
    )


def _channels(what: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    given = tuple(float(value) for value in values)
    if len(given) == 1:
        return given * channels
    if len(given) != channels:
        raise UsageError(f"{what} has {len(given)} values, and the model's images {channels}")
    return given


def _known(classes: Sequence[str], outputs: int, unknown_index: int | None) -> tuple[str, ...]:
    names = tuple(classes)
    if unknown_index is not None and not 0 <= unknown_index < outputs:
        raise UsageError(f"the unknown index {unknown_index} is outside the {outputs} outputs")
    known = outputs - (unknown_index is not None)
    if unknown_index is not None and len(names) == outputs:
        names = names[:unknown_index] + names[unknown_index + 1 :]
    if len(names) != known:
        unknown = "no unknown class" if unknown_index is None else f"unknown index {unknown_index}"
        raise UsageError(
            f"the model has {outputs} outputs and {unknown}, so it needs {known} class names, "
            f"and got {len(names)}",
            remedy="Give one name a class, and --unknown-index where a logit is the unknown class",
        )
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"the class name {twice} is there twice")
    return names


class _Original:
    """The model as it was read, run in batches of its own size."""

    def __init__(self, foreign: Foreign) -> None:
        self._session = Session(foreign.reference)
        self._feed = foreign.input_name
        self._batch = foreign.batch

    def __call__(self, images_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        size = self._batch or 64
        parts = []
        for start in range(0, len(images_NCHW), size):
            chunk = images_NCHW[start : start + size]
            missing = size - len(chunk) if self._batch else 0
            padded = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
            (logits,) = self._session.run({self._feed: padded}).values()
            parts.append(logits[: len(chunk)])
        return np.concatenate(parts)
