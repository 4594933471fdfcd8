"""``moon bench``: latency that can be trusted, against a baseline in the same run."""

from __future__ import annotations

__all__ = ["Scenario", "bench"]

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from moon.cli.bench_view import check_picture, save_picture, show_bench, show_comparison
from moon.cli.console import output, print_json, working
from moon.cli.options import AsJson, Debug
from moon.cli.tuning import show_tuning, tune_bundle
from moon.errors import DataError, UsageError
from moon.files import write_json


class Scenario(str, Enum):
    single = "single"
    multi = "multi"
    rate = "rate"


def bench(
    paths: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE", help="The bundle; with --compare two results.")
    ],
    backends: Annotated[
        list[str] | None,
        typer.Option("--backend", metavar="NAME", help="What to measure; repeatable."),
    ] = None,
    baseline: Annotated[
        str,
        typer.Option(
            "--baseline",
            metavar="NAME",
            help="Measured between the others' queries: dense (the same network with its "
            "zeros filled), a backend, or none.",
        ),
    ] = "dense",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images a query.")] = 1,
    threads: Annotated[
        int, typer.Option("--threads", min=0, help="Threads of each backend; 0: all.")
    ] = 1,
    scenario: Annotated[
        Scenario,
        typer.Option(
            "--scenario",
            help="single: one query after another; multi: 8 samples a query; rate: at a fixed "
            "rate, whether or not the last has finished.",
        ),
    ] = Scenario.single,
    queries: Annotated[
        int, typer.Option("--queries", min=1, help="Queries of each; below 1,024 is not valid.")
    ] = 1024,
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate", help="Queries a second of the scenario rate; default half the peak."
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Try ways to run each convolution in the sparse engine on this CPU, and store "
            "the best in the bundle; nothing else is measured.",
        ),
    ] = False,
    budget: Annotated[
        float, typer.Option("--budget", metavar="SECONDS", min=0.1, help="Time for --tune.")
    ] = 30.0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare two results: --compare A.json B.json.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.json", help="Write the result here too.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE.svg", help="Draw the latencies as a histogram."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure latency, interleaved with a baseline in the same run.

    Reports percentiles, throughput, the speed-up with its 95% interval, and whether the
    measurement is valid: a busy or throttling host and too few queries are flagged.
    With --tune it finds the fastest plans of the sparse engine instead, for this CPU.
    """
    if tune and (compare or picture is not None):
        raise UsageError("--tune goes with neither --compare nor --picture")
    if compare:
        result = _compare(paths)
        show = show_comparison
    elif tune:
        with working("Loading") as progress:
            result = tune_bundle(
                _one(paths), threads=threads, batch=batch, budget=budget, progress=progress
            )
        show = show_tuning
    else:
        if picture is not None:
            check_picture(picture)
        from moon.runtime.bench import bench as run

        with working("Loading") as progress:
            result = run(
                _one(paths),
                backends=backends or ["onnxruntime"],
                baseline=baseline,
                batch=batch,
                threads=threads,
                scenario=scenario.value,
                queries=queries,
                rate=rate,
                progress=progress,
            )
        show = show_bench
    if out is not None:
        write_json(out, result)
    if picture is not None and not compare:
        save_picture(result, picture)
    if as_json:
        print_json(result)
    else:
        show(output(), result)


def _one(paths: list[Path]) -> Path:
    if len(paths) != 1:
        raise UsageError(
            f"moon bench takes one bundle, and got {len(paths)}",
            remedy="Repeat --backend for each backend; --compare takes two results",
        )
    return paths[0]


def _compare(paths: list[Path]) -> dict[str, Any]:
    from moon.runtime.bench_compare import compare

    if len(paths) != 2:
        raise UsageError(
            f"--compare takes two results, and got {len(paths)}",
            remedy="moon bench --compare A.json B.json",
        )
    return compare(*(_read(path) for path in paths))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"could not read {path}: {error.strerror}", remedy="Check the path"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON: {error}", remedy="Write a result with moon bench --out"
        ) from error
