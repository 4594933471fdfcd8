"""``moon eval``: accuracy, calibration and out-of-distribution detection of bundles."""

from __future__ import annotations

__all__ = ["evaluate", "show_report"]

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moon.cli.console import note, output, print_json, working
from moon.cli.options import AsJson, Backend, Debug, named_sources
from moon.cli.text import grid, on_cpu_line, percent
from moon.errors import UsageError

MARKS = {"good": "[green]+[/]", "fair": "[yellow]~[/]", "bad": "[red]![/]", "none": "[dim]-[/]"}


def evaluate(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE", help="One, or several to compare.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Where report.html, report.json and plots/ go."),
    ],
    id_source: Annotated[
        str | None,
        typer.Option("--id", metavar="SOURCE", help="Labelled in-distribution test images."),
    ] = None,
    near: Annotated[
        list[str],
        typer.Option("--near", metavar="NAME=SOURCE", help="A near-OOD set; repeatable."),
    ] = [],  # noqa: B006
    far: Annotated[
        list[str], typer.Option("--far", metavar="NAME=SOURCE", help="A far-OOD set; repeatable.")
    ] = [],  # noqa: B006
    benchmark: Annotated[
        str | None,
        typer.Option(
            "--benchmark",
            metavar="NAME",
            help="OpenOOD's sets under --root: cifar10, cifar100, mnist or imagenet.",
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option("--root", metavar="DIR", help="The benchmark's folder of data."),
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option("--scores", metavar="A,B", help="Only these scores; default all carried."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most so many images of each set.")
    ] = None,
    corruptions: Annotated[
        int,
        typer.Option(
            "--corruptions",
            min=0,
            metavar="N",
            help="So many known images are also shown corrupted, 25 ways; 0 for none.",
        ),
    ] = 250,
    jpeg: Annotated[
        int | None,
        typer.Option(
            "--jpeg",
            min=1,
            max=100,
            metavar="Q",
            help="Show every image of every set re-encoded as JPEG of quality Q.",
        ),
    ] = None,
    backend: Backend = "onnxruntime",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure bundles on in-distribution and out-of-distribution images.

    Writes report.html (one file, opens without a network), report.json and plots/*.png into
    --out, and prints the summary: accuracy, ECE, and AUROC and FPR@95 of each score on near
    and far OOD, each the unweighted mean over its sets. Stopped half-way, the same command
    goes on with the sets that are not done.
    """
    sets = _sets(id_source, near, far, benchmark, root)
    chosen = None if scores is None else [s.strip() for s in scores.split(",") if s.strip()]
    if chosen == []:
        raise UsageError("--scores names no score", remedy="Give some, as in --scores msp,ebo")

    from moon.evaluation.evaluate import evaluate as run

    with working("Opening") as progress:
        report = run(
            bundles,
            **sets,
            scores=chosen,
            limit=limit,
            corruptions=corruptions,
            jpeg=jpeg,
            backend=backend,
            out=out,
            progress=progress,
        )
    if as_json:
        print_json(report.to_json())
    else:
        show_report(output(), report.to_json())
    note(f"wrote {out / 'report.json'} and {out / 'report.html'}")


def _sets(
    known: str | None,
    near: list[str],
    far: list[str],
    benchmark: str | None,
    root: Path | None,
) -> dict[str, Any]:
    """The sets as evaluate takes them: a benchmark's, and any named beside or instead of them."""
    near_sets, far_sets = named_sources("--near", near), named_sources("--far", far)
    both = sorted(set(near_sets) & set(far_sets))
    if both:
        raise UsageError(
            f"{both[0]!r} is both a --near and a --far set", remedy="Give each set its own name"
        )
    if (benchmark is None) != (root is None):
        raise UsageError(
            "--benchmark and --root go together",
            remedy="As in --benchmark cifar10 --root FOLDER/OF/THE/DATA",
        )
    if benchmark is None or root is None:
        if known is None:
            raise UsageError(
                "there are no in-distribution images to measure on",
                remedy="Give --id SOURCE, or --benchmark NAME --root DIR",
            )
        return {"id": known, "near": near_sets, "far": far_sets}

    from moon.evaluation.openood import find_benchmark

    found = find_benchmark(benchmark, root, known=known, given={*near_sets, *far_sets})
    return {
        "id": found.id,
        "near": {**found.near, **near_sets},
        "far": {**found.far, **far_sets},
        "benchmark": {"name": found.name, "missing": list(found.missing)},
    }


def show_report(console: Console, report: dict[str, Any]) -> None:
    """Print the summary of a report: one block a bundle."""
    for line in (report["benchmark"] or {"missing": []})["missing"]:
        console.print(f"[yellow]warning[/] left out, not there: {escape(line)}")
    for one in (report, *report["compared"]):
        known, model = one["id"], one["model"]
        console.print(f"[bold]{escape(model['name'])}[/]  {percent(model['sparsity'])} sparse")
        console.print(escape(one["verdict"]))
        console.print(
            f"accuracy {percent(known['accuracy'], 2)}, ECE {percent(known['ece'], 2)}, "
            f"{known['n']:,} in-distribution images"
        )
        for found in one["findings"]:
            console.print(f"{MARKS[found['state']]} {escape(found['text'])}")
        if any(score["near"] or score["far"] for score in one["scores"].values()):
            console.print(_scores_table(one))
        for warning in one["warnings"]:
            console.print(f"[yellow]warning[/] {escape(warning)}")
        handed_over = one["backend"].get("handed_over") or ""
        if handed_over.startswith("the whole model"):
            note(f"warning: ONNX Runtime runs {handed_over}")
        if line := on_cpu_line(one["backend"]):
            note(f"warning: {line}")


def _scores_table(one: dict[str, Any]) -> Table:
    groups = [g for g in ("near", "far") if any(s[g] for s in one["scores"].values())]
    figures = [f"{group} {what}" for group in groups for what in ("AUROC (95%)", "FPR@95")]
    table = grid("score", *figures, right=figures)
    gate_score = one["gate"]["score"] if one["gate"] else None
    for name, metrics in one["scores"].items():
        table.add_row(f"{name} (gate)" if name == gate_score else name, *_row(metrics, groups))
        if name != gate_score and gate_score is not None:
            continue
        names = [(group, set_name) for group in groups for set_name in metrics[group]["sets"]]
        for group, set_name in names:
            cells = [
                cell
                for other in groups
                for cell in (
                    _cells(metrics[group]["sets"][set_name]) if other == group else ("", "")
                )
            ]
            table.add_row(f"[dim]  {escape(set_name)}[/]", *cells, style="dim")
    return table


def _row(metrics: dict[str, Any], groups: list[str]) -> list[str]:
    return [cell for group in groups for cell in _cells(metrics[group])]


def _cells(figures: dict[str, Any] | None) -> tuple[str, str]:
    if figures is None:
        return "-", "-"
    from moon.evaluation.words import ends as between

    area, ends = percent(figures["auroc"], 2), figures.get("auroc_ci95")
    if ends:
        area += f" ({between(ends).replace(chr(8211), '-')})"
    return area, percent(figures["fpr95_id_pos"], 2)
