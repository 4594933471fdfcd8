"""What paper.py prints: the rows of a table, the compact checkpoints, the table itself."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from image_sets import PROTOCOLS, listed
from jobs import Job
from paper_tables import PAPER_EPOCHS, PaperTable, Row
from spread import Grid, environment, environment_note, figures, shown, summary

from moon.files import write_json, write_text
from moon.trainer.recipe import Recipe

# Quantity, its heading, and how it is printed: the paper gives ECE as a fraction.
SCALES = {"near": (100, 2), "far": (100, 2), "accuracy": (100, 2), "ece": (1, 4)}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the table and its runs, one a seed; or why it cannot be run."""

    row: Row
    recipe: Recipe | None
    jobs: tuple[Job, ...] = ()
    reason: str = ""


def list_rows(lines: list[Line], missing: list[str]) -> None:
    """Each row's recipe, what is left of its runs, and the sets that are not there."""
    rows = [
        (
            line.row.label,
            "-" if line.recipe is None else line.recipe.name,
            ", ".join(job.todo or "done" for job in line.jobs) or line.reason,
        )
        for line in lines
    ]
    Grid(
        title="Rows",
        columns=("row", "recipe", "by seed"),
        rows=rows,
        notes=[*_same(lines), *missing],
        texts=3,
    ).show()


def tell_trained(lines: list[Line]) -> None:
    """The compact checkpoints and their sizes."""
    rows = [
        (job.name, f"{job.pack.stat().st_size / 1e6:.2f} MB")
        for line in lines
        for job in line.jobs
        if job.pack and job.pack.exists()
    ]
    Grid(title="Compact checkpoints", columns=("run", "size"), rows=rows).show()


def tell_table(
    args: argparse.Namespace, table: PaperTable, lines: list[Line], missing: list[str]
) -> None:
    """Print the table and write it as JSON and Markdown."""
    results = [[r for job in line.jobs if (r := job.result()) is not None] for line in lines]
    measured = [figures(found) for found in results]
    notes = [*_alike(lines, measured), *_same(lines)]
    notes += _notes(args, table, lines, missing, [r for found in results for r in found])
    grid = Grid(
        title=f"{table.title_of(args.model)}; near and far: AUROC of {args.score}, %; ± over seeds",
        columns=(
            "", "seeds", "near", "paper", "far", "paper", "accuracy", "paper", "ECE", "paper",
        ),
        rows=[
            _cells(line.row, found, args.score)
            for line, found in zip(lines, measured, strict=True)
        ],
        notes=notes,
    )  # fmt: skip
    rows = [
        {
            "label": line.row.label,
            "recipe": None if line.recipe is None else line.recipe.name,
            "paper": dict(line.row.paper),
            "reason": line.reason or None,
            "figures": found,
            "runs": [job.name for job in line.jobs if job.result() is not None],
        }
        for line, found in zip(lines, measured, strict=True)
    ]
    plain = {"table": args.table, "title": table.title_of(args.model), "environment": environment()}
    write_json(args.out / f"table-{args.table}.json", {**plain, "rows": rows, "notes": notes})
    write_text(args.out / f"table-{args.table}.md", grid.markdown())
    grid.show()


def _cells(row: Row, found: dict[str, Any], score: str) -> list[str]:
    nothing = summary([])
    groups = found["scores"].get(score, {"near": nothing, "far": nothing})
    values = {**groups, "accuracy": found["accuracy"], "ece": found["ece"]}
    cells = [row.label, str(found["accuracy"]["n"])]
    for name, (scale, digits) in SCALES.items():
        # The paper's AUROC are of MSP.
        known = row.paper.get(name) if score == "msp" or name in ("accuracy", "ece") else None
        paper = "-" if known is None else f"{known:.{3 if name == 'ece' else 2}f}"
        cells += [shown(values[name], scale=scale, digits=digits), paper]
    return cells


def _notes(
    args: argparse.Namespace,
    table: PaperTable,
    lines: list[Line],
    missing: list[str],
    results: list[dict],
) -> list[str]:
    protocol = PROTOCOLS[table.data]
    jobs = [job for line in lines for job in line.jobs]
    notes = []
    if jobs and jobs[0].sets is not None:
        sets = jobs[0].sets
        for group, wanted in (("near", protocol.near), ("far", protocol.far)):
            there = list(getattr(sets, group))
            notes.append(f"{group}: mean over {listed(there) or 'no set'} ({len(there)} of "
                         f"{len(wanted)} sets)")  # fmt: skip
    notes += [f"not measured: {line}" for line in missing]
    if args.limit:
        notes.append(f"on at most {args.limit} images of each set")
    if args.jpeg:
        notes.append(f"every test image re-encoded as JPEG of quality {args.jpeg}, 4:2:0")
    notes += _departures(args, table, lines)
    notes += [f"{line.row.label}: not run: {line.reason}" for line in lines if line.reason]
    undone = sum(job.result() is None for job in jobs)
    if undone:
        notes.append(f"{undone} of {len(jobs)} runs are not there yet")
    if results:
        held = {result["model"].get("training_images") for result in results}
        notes.append(f"trained on {listed([f'{n:,}' for n in sorted(filter(None, held))])} images, "
                     "the held-out ones taken from the training set"
                     + ("; published runs hold none out" if table.published else "")
                     )  # fmt: skip
    return [*notes, environment_note(results)]


def _alike(lines: list[Line], measured: list[dict[str, Any]]) -> list[str]:
    """Different recipes whose every figure is the same, which chance does not do."""
    named: dict[str, dict[str, str]] = {}
    for line, found in zip(lines, measured, strict=True):
        if found["accuracy"]["n"]:
            label = line.row.label
            run = label if line.recipe is None else line.recipe.hash
            named.setdefault(repr(found), {}).setdefault(run, label)
    return [
        f"WARNING: {listed(list(labels.values()))} have identical figures: was one trained without "
        "its method?"
        for labels in named.values()
        if len(labels) > 1
    ]


def _same(lines: list[Line]) -> list[str]:
    """Rows whose settings come to one recipe, as epochs rounded to whole ones do."""
    named: dict[str, list[str]] = {}
    for line in lines:
        if line.recipe is not None:
            named.setdefault(line.recipe.hash, []).append(line.row.label)
    return [
        f"{listed(labels)}: one recipe, and one run, at this number of epochs"
        for labels in named.values()
        if len(labels) > 1
    ]


def _departures(args: argparse.Namespace, table: PaperTable, lines: list[Line]) -> list[str]:
    """In what the runs are not the paper's by choice."""
    trained = {(line.recipe.model, line.recipe.epochs) for line in lines if line.recipe}
    as_paper = all(pair == (table.model, PAPER_EPOCHS) for pair in trained) and not args.set
    if as_paper or not table.published:
        return []
    said = listed([f"{model} for {n} epoch{'s'[: n > 1]}" for model, n in sorted(trained)])
    also = f", {listed(args.set)}" if args.set else ""
    return [f"the paper trains {table.model} for {PAPER_EPOCHS} epochs; these runs: {said}{also}"]
