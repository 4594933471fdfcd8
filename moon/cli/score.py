"""``moon score``: decide a whole source of images into a Parquet table."""

from __future__ import annotations

__all__ = ["Engine", "score"]

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moon.cli.console import note, output, print_json, working
from moon.cli.options import AsJson, Backend, Debug
from moon.cli.text import grid, share
from moon.errors import MoonError

if TYPE_CHECKING:
    from moon.runtime.offline import Summary


class Engine(str, Enum):
    local = "local"
    ray = "ray"


def score(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A calibrated bundle.")],
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The images to decide.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.parquet", help="The table to write.")],
    engine: Annotated[
        Engine,
        typer.Option(
            "--engine",
            help="local: threads of this process; ray: actors of Ray Data, on the cluster that "
            "RAY_ADDRESS names or else on this machine.",
        ),
    ] = Engine.local,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Parts decided at a time; default one a core."),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="For one inference.")] = 1,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Add a column p_CLASS for each class.")
    ] = False,
    backend: Backend = "onnxruntime",
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold", metavar="X", help="Accept scores >= X, not the calibrated one."
        ),
    ] = None,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Throw away what an interrupted run of --out had decided."),
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a row an image: input, label, decision, score, threshold, p_value, every score.

    An image that cannot be read gets a row with its error; the others are decided, and the
    exit status is 1. The file appears when it is complete; until then FILE.parquet.parts holds
    what is done, and the same command goes on from there.
    """
    from moon.runtime.offline import score_source

    with working("Opening the bundle") as progress:
        summary = score_source(
            bundle,
            source,
            out,
            engine=engine.value,
            backend=backend,
            threads=threads,
            workers=workers,
            threshold=threshold,
            probabilities=probabilities,
            restart=restart,
            progress=progress,
            warn=_warn,
            say=note,
        )
    _report(out, summary, as_json=as_json)


def _warn(text: str) -> None:
    note(f"warning: {text}")


def _report(out: Path, summary: Summary, *, as_json: bool) -> None:
    tally = {name: getattr(summary, name) for name in ("accept", "abstain", "failed")}
    if as_json:
        counted = {"rows": summary.rows, **tally, "continued": summary.continued}
        print_json({"out": str(out), **counted})
    else:
        table = grid("decision", "images", "share", right=("images", "share"))
        for name, number in tally.items():
            if number or name != "failed":
                table.add_row(name, f"{number:,}", share(number, summary.rows))
        output().print(table)
        output().print(f"{summary.rows:,} rows in {out}", soft_wrap=True, markup=False)
    for failure in summary.errors:
        note(failure)
    if summary.failed:
        raise MoonError(
            f"{summary.failed:,} of {summary.rows:,} images could not be read",
            remedy="The column error says why; the others are decided",
        )
