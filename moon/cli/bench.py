"""``moon bench``: latency that can be trusted, against a baseline in the same run."""

from __future__ import annotations

__all__ = ["Scenario", "bench"]

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from moon.cli.bench_picture import check_picture, save_picture
from moon.cli.bench_view import show_bench, show_comparison
from moon.cli.console import output, print_json, working
from moon.cli.options import AsJson, Debug
from moon.cli.tuning import show_tuning, tune_bundle
from moon.errors import DataError, UsageError
from moon.files import write_json

_HOW: dict[str, Any] = {"rich_help_panel": "How it is measured"}


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
        str | None,
        typer.Option(
            "--baseline",
            metavar="NAME",
            help="Measured between the others' queries: dense (the same network with its zeros "
            "filled; the default where the backend can run it), a backend, or none.",
        ),
    ] = None,
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
        int | None,
        typer.Option(
            "--queries",
            min=1,
            help="Queries of each; below 1,024 is not valid. Default 1,024, or as many as take "
            "2 seconds.",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate", help="Queries a second of the scenario rate; default half the peak."
        ),
    ] = None,
    min_time: Annotated[
        float | None,
        typer.Option(
            "--min-time", metavar="SECONDS", min=0, help="Measure for at least so long.", **_HOW
        ),
    ] = None,
    max_time: Annotated[
        float | None,
        typer.Option(
            "--max-time",
            metavar="SECONDS",
            help="Make fewer queries where they would take longer.",
            **_HOW,
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            "--warmup", min=0, help="Uncounted queries of each first; default a twentieth.", **_HOW
        ),
    ] = None,
    settle: Annotated[
        int, typer.Option("--settle", min=0, help="Uncounted queries before each block.", **_HOW)
    ] = 2,
    affinity: Annotated[
        str | None,
        typer.Option(
            "--affinity", metavar="CORES", help="Keep the process on these, as in 0 or 2-3.", **_HOW
        ),
    ] = None,
    spin: Annotated[
        bool,
        typer.Option("--spin/--no-spin", help="Let idle threads of backends spin.", **_HOW),
    ] = True,
    transfers: Annotated[
        bool,
        typer.Option("--transfers/--no-transfers", help="Count copies to and from a GPU.", **_HOW),
    ] = True,
    loads: Annotated[
        int | None,
        typer.Option(
            "--loads",
            min=1,
            help="Times each model is loaded while measuring; the interval is over these. "
            "Default 8, fewer where loading takes long.",
            **_HOW,
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            "--processes",
            min=0,
            help="Fresh processes in which loading and first inferences are measured.",
            **_HOW,
        ),
    ] = 3,
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
    With --compare it says which of two results is faster, as far as noise lets it.
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
        from moon.runtime.bench_host import parse_cores

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
                min_time=min_time,
                max_time=max_time,
                warmup=warmup,
                settle=settle,
                affinity=None if affinity is None else parse_cores(affinity),
                spin=spin,
                transfers=transfers,
                loads=loads,
                processes=processes,
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
