"""``moon export``: a trained run, or one's own ONNX model, becomes a bundle."""

from __future__ import annotations

__all__ = ["Precision", "Values", "Weights", "export"]

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from moon.cli.console import output, print_json, working
from moon.cli.facts import bundle_facts, bytes_line, classes_line
from moon.cli.options import AsJson, Debug, not_yet
from moon.cli.text import gate_line, pairs, percent
from moon.errors import DataError, UsageError


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
    model: Annotated[
        Path,
        typer.Argument(metavar="RUN|MODEL.onnx", help="A folder of moon train, or an ONNX file."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="BUNDLE", help="The folder to write.")],
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
        bool, typer.Option("--trt", help="A TensorRT engine too; not in this version.")
    ] = False,
    trt_target: Annotated[
        list[str],
        typer.Option(
            "--trt-target", metavar="sm_86", help="For --trt; repeatable. Not in this version."
        ),
    ] = [],  # noqa: B006
    force: Annotated[bool, typer.Option("--force", help="Replace BUNDLE if it exists.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a bundle: one small ONNX graph that gates itself, and how to use it.

    RUN: a folder written by moon train. MODEL.onnx: your own classifier, [N, C, H, W]
    float32 to logits; --classes, --mean and --std describe it, and without --data it is left
    uncalibrated.
    """
    if trt or trt_target:
        raise not_yet("--trt", "Export without it; the bundle runs on ONNX Runtime")
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
    }
    foreign = {"--classes": classes, "--mean": mean, "--std": std, "--unknown-index": unknown_index}
    with working("Loading") as progress:
        if model.suffix.lower() == ".onnx" or model.is_file():
            from moon.export.foreign import from_onnx

            described = _describe(foreign)
            bundle = from_onnx(model, out, progress=progress, **described, **settings)
        else:
            given = [option for option, value in foreign.items() if value is not None]
            if given:
                raise UsageError(
                    f"{given[0]} describes a MODEL.onnx, but {model} is not one",
                    remedy="Leave it out: a run knows its own classes and preprocessing",
                )
            from moon.export.to_bundle import to_bundle

            bundle = to_bundle(model, out, progress=progress, **settings)
    facts = bundle_facts(bundle)
    if as_json:
        print_json(facts)
    else:
        _show(facts, bundle.gate())


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


def _describe(foreign: dict[str, Any]) -> dict[str, Any]:
    for option in ("--classes", "--mean", "--std"):
        if foreign[option] is None:
            raise UsageError(
                f"a MODEL.onnx needs {option}",
                remedy="Give --classes FILE, --mean and --std as the model was trained with",
            )
    return {
        "classes": _classes(foreign["--classes"]),
        "mean": _numbers("--mean", foreign["--mean"]),
        "std": _numbers("--std", foreign["--std"]),
        "unknown_index": _index(foreign["--unknown-index"]),
    }


def _classes(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"could not read the classes in {path}: {error}", remedy="Give a UTF-8 text file"
        ) from error
    if text.lstrip().startswith("["):
        try:
            names = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"{path} is not JSON: {error}", remedy="Give a list of names"
            ) from error
        if not all(isinstance(name, str) for name in names):
            raise DataError(f"{path} does not hold a list of names", remedy="Give texts only")
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise DataError(f"{path} names no classes", remedy="Write one class name a line")
    return list(names)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise UsageError(
            f"{option} {text!r} is not a list of numbers", remedy=f"Write {option} 0.5,0.5,0.5"
        ) from None


def _index(text: str | None) -> int | None:
    if text is None or text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"--unknown-index {text!r} is neither a whole number nor none",
            remedy="Give the position of the unknown logit, from 0, or none",
        ) from None


def _show(facts: dict[str, Any], gate: Any) -> None:
    table = pairs()
    table.add_row("Bundle", escape(facts["path"]))
    table.add_row("Version", facts["version"])
    table.add_row("Classes", classes_line(facts))
    table.add_row("Sparsity", f"{percent(facts['sparsity'])} ({facts['pattern']})")
    table.add_row("model.onnx", bytes_line(facts))
    table.add_row("Scores", ", ".join(facts["scores"]))
    for name, why in facts["provenance"]["export"]["left_out"].items():
        table.add_row("", escape(f"not {name}: {why}"))
    table.add_row("Gate", gate_line(gate))
    if (measured := facts["provenance"]["export"]["parity"].get("int8")) is not None:
        table.add_row("int8", _int8_line(measured))
    output().print(table)


def _int8_line(measured: dict[str, Any]) -> str:
    labels, decisions = percent(measured["top1_agreement"]), percent(measured["gate_agreement"])
    line = f"against fp32 {labels} of labels and {decisions} of decisions the same"
    if measured["accuracy"] is not None:
        accuracy = measured["accuracy"]
        line = f"accuracy {accuracy['int8']:.2%}, fp32 {accuracy['fp32']:.2%}; {line}"
    return f"{line}, over {measured['images']:,} images"
