"""TensorRT engines on the command line: the options of ``moon export --trt``, and what is shown."""

from __future__ import annotations

__all__ = [
    "EngineOptions",
    "TrtBatch",
    "TrtCompress",
    "TrtPackage",
    "TrtPrecision",
    "TrtTarget",
    "add_engines",
    "add_to_bundle",
    "engine_lines",
    "request",
]

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from moon.cli.text import size
from moon.errors import UsageError

if TYPE_CHECKING:
    from moon.bundle import Bundle
    from moon.cli.console import Working
    from moon.export.trt.request import EngineRequest

# A share of zeros that somebody meant.
_SPARSE = 0.01


class Package(str, Enum):
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt_rtx"


class LayerPrecision(str, Enum):
    fp16 = "fp16"
    fp32 = "fp32"


TrtTarget = Annotated[
    list[str],
    typer.Option(
        "--trt-target",
        metavar="sm_86",
        help="A GPU the engine is for; repeatable; default the one here.",
    ),
]
TrtBatch = Annotated[
    str,
    typer.Option(
        "--trt-batch",
        metavar="MIN,OPT,MAX",
        help="Images together: least, what it is to be fastest for, most.",
    ),
]
TrtPrecision = Annotated[
    LayerPrecision,
    typer.Option("--trt-precision", help="Of the layers; the last and the scores are fp32."),
]
TrtPackage = Annotated[
    Package | None,
    typer.Option("--trt-package", help="What builds it; default what fits and is installed."),
]
TrtCompress = Annotated[bool, typer.Option("--trt-compress", help="Store the engine with zstd.")]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The options of ``--trt`` as they were typed."""

    wanted: bool
    target: list[str]
    batch: str
    precision: LayerPrecision
    package: Package | None
    compress: bool


def request(options: EngineOptions, given: set[str]) -> EngineRequest | None:
    """What engine is asked for; None without ``--trt``.

    Args:
        given: names of the parameters that were typed.

    Raises:
        UsageError: an option makes no sense, or stands without ``--trt``.
    """
    alone = sorted(name for name in given if name.startswith("trt_"))
    if not options.wanted:
        if alone:
            option = f"--{alone[0].replace('_', '-')}"
            raise UsageError(
                f"{option} says how an engine is built", remedy="Add --trt, or leave it"
            )
        return None
    from moon.export.trt.request import EngineRequest, read_profile, read_targets

    return EngineRequest(
        targets=read_targets(options.target),
        package=None if options.package is None else options.package.value,
        precision=options.precision.value,
        profile=read_profile(options.batch),
        compress=options.compress,
    )


def add_to_bundle(
    path: Path,
    engine: EngineRequest | None,
    given: set[str],
    *,
    data: str | None,
    progress: Working,
) -> Bundle:
    """``moon export BUNDLE --trt``: the bundle gets an engine; nothing else of it changes.

    Args:
        given: names of the parameters that were typed.
        data: images to compare the network on.

    Raises:
        UsageError: without ``--trt``, or with options that say how a bundle is written.
    """
    if engine is None:
        raise UsageError(
            f"{path} is a bundle already", remedy="Add an engine to it with --trt, or name a run"
        )
    other = sorted(
        name
        for name in given - {"model", "data", "trt", "as_json", "debug"}
        if not name.startswith("trt_")
    )
    if other:
        option = f"--{other[0].replace('_', '-')}"
        raise UsageError(
            f"{option} does not go with a bundle: the engine is put into {path} itself",
            remedy=f"Leave {option} out; to keep the bundle as it is, copy it first",
        )
    from moon.data.source import open_source
    from moon.export.trt.engine import add_engine

    images = None if data is None else open_source(data)
    bundle, _ = add_engine(path, engine, images=images, progress=progress)
    return bundle


def add_engines(table: Table, facts: Mapping[str, Any]) -> None:
    """Rows for each engine of a bundle, given its facts."""
    for engine in facts["engines"]:
        for place, line in enumerate(engine_lines(engine, facts["sparsity"])):
            table.add_row("" if place else "Engine", escape(line))


def engine_lines(facts: Mapping[str, Any], sparsity: float) -> list[str]:
    """What people are told of an engine: what it is, how far it was tried, and what of 2:4.

    Args:
        facts: of the engine, from its record.
        sparsity: share of the bundle's weights that is zero.
    """
    if "error" in facts:
        return [f"{facts['record']}: {facts['error']}"]
    from moon.runtime.trt.package import PACKAGES

    title = f"{PACKAGES[facts['package']].title} {facts['package_version']}"
    gpus = ", ".join(facts["targets"])
    profile = facts["profile"]
    batches = f"{profile['min']} to {profile['max']} images, fastest for {profile['opt']}"
    stored = size(facts["stored_bytes"])
    if facts["compression"]:
        stored += f" ({size(facts['bytes'])} unpacked)"
    lines = [f"{title} for {gpus}, {facts['precision']}, {batches}, {stored}"]
    lines.append("STALE: built from another model" if facts["stale"] else _tried(facts))
    sparse = _sparse(facts["sparsity"], sparsity)
    return [*lines, sparse] if sparse else lines


def _tried(facts: Mapping[str, Any]) -> str:
    parity = facts["parity"]
    network = (
        f"its network differs by {parity['max_abs']:.1e} over {parity['images']:g} images on "
        "ONNX Runtime"
    )
    if facts["checked"] == "header":
        return f"built without a GPU and not executed; {network}"
    return f"built on {facts['gpu']}, {len(facts['layers'])} layers; {network}"


def _sparse(found: Mapping[str, Any], sparsity: float) -> str:
    """What to expect of the zeros on a GPU."""
    eligible, picked = found["eligible"], found["picked"]
    if not eligible and sparsity < _SPARSE:
        return ""
    if not eligible:
        return (
            "no layer keeps 2:4: on a GPU these zeros make the file smaller, not the model faster"
        )
    count = f"{len(eligible)} layer{'s'[: len(eligible) != 1]} can use 2:4 kernels"
    if picked is None:
        return f"{count}; which do is not known: {found['why']}"
    return f"{count}, the builder picked them for {len(picked)}"
