"""``moon export``: a trained run, or one's own ONNX model, becomes a bundle."""

from __future__ import annotations

__all__ = ["Precision", "Values", "Weights", "export"]

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from moon.cli.console import output, print_json, working
from moon.cli.engine_build import (
    EngineOptions,
    LayerPrecision,
    TrtBatch,
    TrtCompress,
    TrtPackage,
    TrtPrecision,
    TrtTarget,
    add_engines,
    add_to_bundle,
    request,
)
from moon.cli.facts import bundle_facts, bytes_line, classes_line
from moon.cli.foreign import describe
from moon.cli.options import AsJson, Debug
from moon.cli.parity_view import ParityBackend, ParityFlips, ParityImages, parity_lines
from moon.cli.text import gate_line, pairs, percent
from moon.errors import UsageError

if TYPE_CHECKING:
    from moon.bundle import Bundle


class Weights(str, Enum):
    compact = "compact"
    dense = "dense"
    coo = "coo"


class Values(str, Enum):
    fp32 = "fp32"
    fp16 = "fp16"


class Precision(str, Enum):
    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


def export(
    context: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|MODEL.onnx|BUNDLE",
            help="A folder of moon train, an ONNX file, or with --trt a bundle.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="BUNDLE", help="The folder to write.")
    ] = None,
    weights: Annotated[
        Weights, typer.Option("--weights", help="How the file stores sparse weights.")
    ] = Weights.compact,
    values: Annotated[
        Values, typer.Option("--values", help="How the file stores each weight's value.")
    ] = Values.fp32,
    precision: Annotated[
        Precision, typer.Option("--precision", help="The arithmetic of the graph.")
    ] = Precision.fp32,
    max_change: Annotated[
        float,
        typer.Option(
            "--max-change",
            metavar="SHARE",
            help="int8 only: share of held-out images whose label or decision may change.",
        ),
    ] = 0.02,
    score: Annotated[
        str, typer.Option("--score", metavar="NAME", help="The gate's score.")
    ] = "ebo",
    carry: Annotated[
        list[str],
        typer.Option(
            "--carry",
            metavar="NAME",
            help="A further score in the graph, or all; repeatable. msp, ebo and mls always are.",
        ),
    ] = [],  # noqa: B006
    setting: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="SCORE.OPTION=VALUE", help="How a score is fitted, as knn.size=500."
        ),
    ] = [],  # noqa: B006
    p_values: Annotated[
        bool, typer.Option("--p-values", help="A p-value of every carried score in the graph too.")
    ] = False,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SOURCE",
            help="Training images to fit scores to; default those the run was trained on.",
        ),
    ] = None,
    fit_limit: Annotated[
        int, typer.Option("--fit-limit", metavar="N", help="Fit to N of them, drawn at random.")
    ] = 50_000,
    reject: Annotated[
        float,
        typer.Option("--reject", help="Share of in-distribution images that may be rejected."),
    ] = 0.05,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help="Held-out images for calibration and golden inputs; default the run's "
            "validation split.",
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            "--classes", metavar="FILE", help="MODEL.onnx only: a class name a line, or JSON."
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option("--mean", metavar="M,...", help="MODEL.onnx only: mean a channel, in [0, 1]."),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option("--std", metavar="S,...", help="MODEL.onnx only: deviation a channel."),
    ] = None,
    unknown_index: Annotated[
        str | None,
        typer.Option(
            "--unknown-index", metavar="I|none", help="MODEL.onnx only: which logit is the unknown."
        ),
    ] = None,
    trt: Annotated[
        bool, typer.Option("--trt", help="A TensorRT engine too; BUNDLE: into the bundle itself.")
    ] = False,
    trt_target: TrtTarget = [],  # noqa: B006
    trt_batch: TrtBatch = "1,1,32",
    trt_precision: TrtPrecision = LayerPrecision.fp16,
    trt_package: TrtPackage = None,
    trt_compress: TrtCompress = False,
    parity_images: ParityImages = 1000,
    parity_flips: ParityFlips = None,
    parity_backend: ParityBackend = [],  # noqa: B006
    force: Annotated[bool, typer.Option("--force", help="Replace BUNDLE if it exists.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a bundle: one small ONNX graph that gates itself, and how to use it.

    RUN: a folder written by moon train. MODEL.onnx: your own classifier, [N, C, H, W]
    float32 to logits; --classes, --mean and --std describe it, and without --data it is left
    uncalibrated. BUNDLE --trt: put a TensorRT engine into a bundle, on the machine it is for or,
    for RTX GPUs, on any.
    """
    given = _given(context)
    engine = request(
        EngineOptions(
            wanted=trt,
            target=trt_target,
            batch=trt_batch,
            precision=trt_precision,
            package=trt_package,
            compress=trt_compress,
        ),
        given,
    )
    from moon.export.parity import Comparing

    settings: dict[str, Any] = {
        "weights": weights.value,
        "values": values.value,
        "precision": precision.value,
        "max_change": max_change,
        "score": score,
        "carry": tuple(carry),
        "settings": _settings(setting),
        "p_values": p_values,
        "fit": fit,
        "fit_limit": fit_limit,
        "reject": reject,
        "data": data,
        "force": force,
        "comparing": Comparing(
            images=parity_images, flips=parity_flips, backends=tuple(parity_backend)
        ),
    }
    foreign = {"--classes": classes, "--mean": mean, "--std": std, "--unknown-index": unknown_index}
    with working("Loading") as progress:
        if (model / "manifest.json").is_file():
            bundle = add_to_bundle(model, engine, given, data=data, progress=progress)
        else:
            settings |= {"trt": engine or False, "progress": progress}
            bundle = _export(model, _required(out), foreign, settings)
    facts = bundle_facts(bundle)
    if as_json:
        print_json(facts)
    else:
        _show(facts, bundle.gate())


def _export(model: Path, out: Path, foreign: dict[str, Any], settings: dict[str, Any]) -> Bundle:
    """A run or an ONNX file as a bundle."""
    if model.suffix.lower() == ".onnx" or model.is_file():
        from moon.export.foreign import from_onnx

        return from_onnx(model, out, **describe(foreign), **settings)
    given = [option for option, value in foreign.items() if value is not None]
    if given:
        raise UsageError(
            f"{given[0]} describes a MODEL.onnx, but {model} is not one",
            remedy="Leave it out: a run knows its own classes and preprocessing",
        )
    from moon.export.to_bundle import to_bundle

    return to_bundle(model, out, **settings)


def _given(context: typer.Context) -> set[str]:
    """Names of the parameters that were typed."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _required(out: Path | None) -> Path:
    if out is None:
        raise UsageError("Missing option --out", remedy="Name the folder to write: --out BUNDLE")
    return out


def _settings(given: list[str]) -> dict[str, dict[str, Any]]:
    """``knn.size=500`` -> {"knn": {"size": 500}}; a value is a number, true, false or a text."""
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        key, equals, value = text.partition("=")
        name, dot, option = key.strip().partition(".")
        if not (equals and dot and name and option):
            raise UsageError(
                f"--set {text!r} is not SCORE.OPTION=VALUE", remedy="Write --set knn.size=500"
            )
        found.setdefault(name, {})[option] = _value(value.strip())
    return found


def _value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _show(facts: dict[str, Any], gate: Any) -> None:
    table = pairs()
    table.add_row("Bundle", escape(facts["path"]))
    table.add_row("Version", facts["version"])
    table.add_row("Classes", classes_line(facts))
    table.add_row("Sparsity", f"{percent(facts['sparsity'])} ({facts['pattern']})")
    table.add_row("model.onnx", bytes_line(facts))
    table.add_row("Scores", ", ".join(facts["scores"]))
    export = facts["provenance"].get("export", {})
    for name, why in export.get("left_out", {}).items():
        table.add_row("", escape(f"not {name}: {why}"))
    table.add_row("Gate", gate_line(gate))
    for what, line in parity_lines(export.get("parity", {})):
        table.add_row(what, escape(line))
    add_engines(table, facts)
    output().print(table)
