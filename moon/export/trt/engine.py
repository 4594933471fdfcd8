"""A bundle gets an engine: network, checks, build, record, stored as one change."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

import moon
from moon.bundle import Bundle
from moon.calibrated import calibrated_values, model_hash
from moon.data.items import Source
from moon.data.load import load_pixels
from moon.errors import ExportError, ParityError, UsageError
from moon.export.pack import round_values
from moon.export.session import Session, check_survives
from moon.export.trt.build_log import eligible_layers, picked_layers, sparse_tactics
from moon.export.trt.builder import Engine, build, inspect
from moon.export.trt.int8 import signed
from moon.export.trt.network import check_size, halved, plain, with_targets
from moon.export.trt.overflow import check_finite
from moon.export.trt.request import Choice, EngineRequest, choose
from moon.export.trt.sparsity import lint
from moon.progress import Progress, silent
from moon.runtime.trt.api import Api, load
from moon.runtime.trt.sidecar import EngineRecord, Sparsity, engine_name
from moon.runtime.trt.stored import store
from moon.runtime.verify import parity

__all__ = ["CHECK_IMAGES", "add_engine"]

# As for an fp16 graph: rates to a tenth of a percent need a thousand images.
CHECK_IMAGES = 1000
_TOP1, _GATE = 0.999, 0.995
_FLOAT_BYTES = 4

Outputs = dict[str, NDArray[Any]]


def add_engine(
    bundle: Bundle | str | os.PathLike[str],
    request: EngineRequest | None = None,
    *,
    images: Source | None = None,
    progress: Progress = silent,
) -> tuple[Bundle, EngineRecord]:
    """Build a TensorRT engine of a bundle and put it into its engines/, as one change.

    Needs neither torch nor the run the bundle was made of, so it works on the target as well.
    Another engine of the same package, GPUs and precision is replaced.

    Args:
        bundle: rewritten in place; its version stays.
        request: what engine; default fp16 for the GPU at hand.
        images: in-distribution images to compare the network on before it is built, at most
            1,000 of them; default the golden inputs.

    Returns:
        The bundle, reopened, and the engine's record.

    Raises:
        UsageError, MissingExtraError, BackendError: see `choose`.
        ParityError: the network answers otherwise than the bundle, or overflows in fp16.
        ExportError: TensorRT cannot build it; the bundle stays as it was.
    """
    request = EngineRequest() if request is None else request
    choice = choose(request)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if opened.manifest.precision == "int8":
        request = replace(request, precision="int8")
    _check(opened, request)
    api = load(choice.package)
    progress(0, 4, "preparing the network")
    model = opened.model_bytes()
    network, figures = _network(opened, model, request, choice, images, progress)
    data = network.SerializeToString()
    eligible = tuple(layer.name for layer in lint(data) if layer.eligible)
    progress(2, 4, f"building with {api.title}")
    engine = build(
        api, data, profile=request.profile, targets=choice.targets, sparse=bool(eligible)
    )
    progress(3, 4, "checking the engine")
    record = _record(opened, request, choice, api, engine, eligible, figures, model_hash(model))
    written = store(opened, record, engine.data)
    progress(4, 4, "checking the engine")
    return written, record


def _check(bundle: Bundle, request: EngineRequest) -> None:
    """What can be refused before any work."""
    if not os.access(bundle.path.resolve().parent, os.W_OK):
        raise ExportError(
            f"could not write in {bundle.path.resolve().parent}: Permission denied",
            remedy="Check the permissions of the folder, or copy the bundle to another one",
        )
    if request.precision == "fp32" and bundle.manifest.precision == "fp16":
        raise UsageError(
            f"{bundle.path} computes in fp16, so it has no fp32 layers to build",
            remedy="Build it with --trt-precision fp16, or export it with --precision fp32",
        )
    if request.precision == "int8" and bundle.manifest.precision != "int8":
        raise UsageError(
            f"{bundle.path} computes in {bundle.manifest.precision}, and an int8 engine needs "
            "ranges that were measured",
            remedy="Export it with --precision int8",
        )
    layers = bundle.manifest.sparsity.layers.values()
    check_size(_FLOAT_BYTES * sum(math.prod(layer.shape) for layer in layers))


def _network(
    bundle: Bundle,
    model: bytes,
    request: EngineRequest,
    choice: Choice,
    images: Source | None,
    progress: Progress,
) -> tuple[ModelProto, dict[str, float | None]]:
    """The network to build, and how it compares with the bundle's graph."""
    wide = plain(model)
    half = request.precision == "fp16" and bundle.manifest.precision != "fp16"
    network = with_targets(halved(wide) if half else signed(wide), choice.targets)
    settings = calibrated_values(model)
    pixels = _pixels(bundle, images)
    progress(1, 4, f"comparing it over {len(pixels):,} images")
    if half:
        _check_loads(network)
    if request.precision == "fp16":
        few = _feed(bundle, bundle.golden()["pixels"])
        check_finite(network, {"input": few, **settings})
    # Rounding of the weights is the format's own effect, and none of the arithmetic.
    reference = _outputs(round_values(wide, "fp16") if half else wide, bundle, pixels, settings)
    found = _outputs(network, bundle, pixels, settings)
    return network, _compared(bundle, request, reference, found)


def _check_loads(network: ModelProto) -> None:
    try:
        check_survives(network)
    except ExportError as error:
        raise ExportError(error.cause, remedy="Build it with --trt-precision fp32") from error


def _pixels(bundle: Bundle, images: Source | None) -> NDArray[np.uint8]:
    if images is None or not len(images):
        pixels: NDArray[np.uint8] = bundle.golden()["pixels"]
        return pixels
    count = min(CHECK_IMAGES, len(images))
    return load_pixels(images, bundle.preprocess, np.arange(count) * len(images) // count)


def _feed(bundle: Bundle, pixels_NHWC: NDArray[np.uint8]) -> NDArray[Any]:
    as_is = bundle.manifest.input.dtype == "uint8"
    return pixels_NHWC if as_is else bundle.preprocess.normalise(pixels_NHWC)


def _outputs(
    network: ModelProto, bundle: Bundle, pixels: NDArray[np.uint8], settings: Outputs
) -> Outputs:
    # Kernels for whole int8 layers round otherwise than the graph says; the graph is compared.
    session = Session(network, threads=0, optimise=bundle.manifest.precision != "int8")
    parts = [
        session.run({"input": _feed(bundle, pixels[i : i + 64]), **settings})
        for i in range(0, len(pixels), 64)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _compared(
    bundle: Bundle, request: EngineRequest, reference: Outputs, found: Outputs
) -> dict[str, float | None]:
    """Figures of the comparison.

    Raises:
        ParityError: they are out of bounds.
    """
    gate = bundle.gate()
    bars = None if gate is None else gate.bars(reference["label"])
    result = parity(reference, found, precision=request.precision, threshold=bars)
    count = len(reference["label"])
    rates = ((result.top1_agreement, _TOP1, "labels"), (result.gate_agreement, _GATE, "decisions"))
    remedy = "Build it with --trt-precision fp32" if request.precision == "fp16" else ""
    for rate, least, what in rates:
        if rate is not None and rate < least:
            raise ParityError(
                f"the network for TensorRT gives the same {what} for {rate:.2%} of {count} "
                f"images, less than {least:.1%}",
                remedy=remedy,
            )
    if not result.max_abs_within:
        raise ParityError(
            f"the network for TensorRT gives logits that differ by {result.max_abs:.3g}, more "
            f"than {request.precision} explains",
            remedy=remedy,
        )
    return {
        "images": count,
        "max_abs": result.max_abs,
        "top1_agreement": result.top1_agreement,
        "gate_agreement": result.gate_agreement,
    }


def _record(
    bundle: Bundle,
    request: EngineRequest,
    choice: Choice,
    api: Api,
    engine: Engine,
    eligible: tuple[str, ...],
    figures: Mapping[str, float | None],
    model: str,
) -> EngineRecord:
    from moon.files import sha256_bytes

    validity = api.check(engine.data)
    if not validity.ok:
        raise ExportError(f"{api.title} does not take the engine that it built: {validity.why}")
    layers, why = inspect(api, engine.data)
    name = engine_name(api.name, api.version, choice.targets, request.precision)
    return EngineRecord(
        file=f"{name}.zst" if request.compress else name,
        sha256=sha256_bytes(engine.data),
        size=len(engine.data),
        compression="zstd" if request.compress else None,
        package=api.name,
        package_version=api.version,
        parser_version=api.parser_version,
        moon=moon.__version__,
        built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        build_s=round(engine.seconds, 3),
        targets=choice.targets,
        gpu=None if choice.gpu is None else choice.gpu.name,
        precision=request.precision,
        inputs=engine.inputs,
        outputs=engine.outputs,
        profile=request.profile,
        flags=engine.flags,
        layers=None if layers is None else tuple(str(one.get("Name", "")) for one in layers),
        checked="header" if layers is None else "opened",
        parity=figures,
        model_sha256=model,
        sparsity=_sparsity(bundle, choice, engine, eligible, layers, why),
    )


def _sparsity(
    bundle: Bundle,
    choice: Choice,
    engine: Engine,
    eligible: tuple[str, ...],
    layers: list[dict[str, Any]] | None,
    why: str,
) -> Sparsity:
    """What 2:4 came to: by the builder's word, else by the weights and the kernels' names."""
    said = eligible_layers(engine.messages)
    picked = picked_layers(engine.messages)
    if not eligible:
        reason, picked = "no layer keeps the 2:4 rule", ()
    elif picked is not None:
        reason = ""
    elif choice.package == "tensorrt_rtx":
        reason = "TensorRT-RTX chooses kernels where the engine first runs, and does not say which"
    elif layers is not None:
        reason, picked = "by the names of its kernels", sparse_tactics(layers)
    else:
        reason = f"the builder did not say, and {why}"
    return Sparsity(
        pattern=bundle.manifest.sparsity.pattern,
        asked="SPARSE_WEIGHTS" in engine.flags,
        eligible=eligible if said is None else said,
        picked=picked,
        why=reason,
    )
