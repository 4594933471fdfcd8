"""Accuracy on a test set against the structure that the connections must have.

    python benchmarks/structures.py --out runs/structures --jobs 2
    python benchmarks/structures.py --data cifar10.npz --recipes cifar10-resnet18 --epochs 100

Each sparsity is trained unstructured, 2:4-compatible (at most 2 of 4 input channels, fewer in
all), in blocks of 4 output channels, with constant fan-in, and with 1 of M input channels where
1/M is the density (1:5, 1:10, 1:20), each by RigL and SET; unstructured also by gradual magnitude
pruning; and once dense. In every sparse run the first convolution stays dense, and counts in the
sparsity, since with one or three input channels it can have none of the N:M structures; so rows
differ in their structure alone. The column `sparsity` is what the runs have.

--data BASE stands for two SOURCEs, BASE#train and BASE#test. The default is Debian's package
dataset-fashion-mnist where it is installed, else torchvision's. The default of 8 epochs is for a
CPU, and far from convergence: it compares, it sets no records.

Runs are kept under --out; the command can be repeated until it is done. Writes structures.json,
structures.md and structures.png there.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import Job, TestSets
from pool import Pool, StoppedError
from spread import Grid, environment, environment_note, seeds, shown, summary

from moon.errors import MoonError, RecipeError, UsageError
from moon.files import write_bytes, write_json, write_text
from moon.trainer.recipe import Recipe
from moon.trainer.recipes import find_recipe

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
EXACT = {80: "1:5", 90: "1:10", 95: "1:20"}
SPARSITIES = "80,90,95"
RULES = ("rigl", "set")
# Rule, structure, name and marker of the line that both panels share.
GMP = ("gmp", "unstructured", "GMP, unstructured", "s--")
TITLES = {"rigl": "RigL", "set": "SET", "gmp": "GMP", "dense": "dense"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One rule, structure and sparsity, and its runs, one a seed; or why there are none."""

    rule: str
    structure: str
    percent: int
    jobs: tuple[Job, ...] = ()
    reason: str = ""

    @property
    def kind(self) -> str:
        """The structure under one name for all sparsities."""
        return "1:M" if self.structure == EXACT.get(self.percent) else self.structure

    @property
    def title(self) -> str:
        return f"{TITLES[self.rule]} {self.structure} {self.percent}%"

    def results(self) -> list[dict]:
        return [found for job in self.jobs if (found := job.result()) is not None]


def main(words: list[str] | None = None) -> int:
    args = _arguments(words)
    try:
        lines = [_line(args, *cell) for cell in _cells(args)]
        lines = [line for line in lines if not args.rows or args.rows in line.title]
        failures: dict[str, str] = {}
        if not args.show:
            jobs = [job for line in lines for job in line.jobs if job.todo]
            failures = Pool(args.jobs, lambda text: print(text, flush=True)).run(jobs)
        _tell(args, lines)
    except StoppedError:
        print("structures: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except MoonError as error:
        print(f"structures: {error}", file=sys.stderr)
        return error.exit_code
    reasons = failures | {line.title: line.reason for line in lines if line.reason}
    for name, reason in reasons.items():
        print(f"structures: {name}: {reason}", file=sys.stderr)
    return 1 if reasons else 0


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="BASE", help="BASE#train and BASE#test are SOURCEs")
    parser.add_argument("--recipes", default="fashionmnist-cnn", metavar="DATA-MODEL")
    parser.add_argument("--sparsities", default=SPARSITIES, help=f"default {SPARSITIES}")
    parser.add_argument("--seeds", default="0,1,2", help="default 0,1,2")
    parser.add_argument("--epochs", type=int, default=8, help="default 8")
    parser.add_argument("--images", type=int, metavar="N", help="train on the first N alone")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rows", metavar="TEXT", help="only rows whose title holds it")
    parser.add_argument("--out", type=Path, default=Path("runs/structures"), metavar="DIR")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--show", action="store_true", help="print what is there, run nothing")
    return parser.parse_args(words)


def _cells(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Every (rule, structure, sparsity in percent), in the order of the table."""
    cells = [("dense", "unstructured", 0)]
    for percent in seeds(args.sparsities, option="--sparsities"):
        cells.append(("gmp", "unstructured", percent))
        kinds = ["unstructured", "2:4", "block4x1", "fan-in"]
        kinds += [EXACT[percent]] if percent in EXACT else []
        cells += [(rule, kind, percent) for rule in RULES for kind in kinds]
    return cells


def _line(args: argparse.Namespace, rule: str, structure: str, percent: int) -> Line:
    base, portable = _base(args)
    chosen = f"[0:{args.images}]" if args.images else ""
    try:
        recipe = _recipe(args, rule, structure, percent)
        recipe = recipe.override([f"data.train={base}#train{chosen}"])
    except RecipeError as error:
        return Line(rule=rule, structure=structure, percent=percent, reason=str(error))
    jobs = tuple(
        Job(
            name=f"{recipe.name}-seed{seed}",
            recipe=recipe.override([f"seed={seed}"]),
            out=args.out,
            train_as=f"{portable}#train{chosen}",
            train=not args.show,
            sets=TestSets(known=f"{base}#test", portable={"id": f"{portable}#test"}),
            device=args.device,
        )
        for seed in seeds(args.seeds)
    )
    return Line(rule=rule, structure=structure, percent=percent, jobs=jobs)


def _base(args: argparse.Namespace) -> tuple[str, str]:
    """The images, and how to call them wherever they lie."""
    if args.data is None:
        data = str(DEBIAN) if DEBIAN.is_dir() else "torchvision:FashionMNIST"
        return data, data.rpartition("/")[2]
    if "#" in args.data:
        raise UsageError(f"--data {args.data!r} has a split", remedy="Leave #... out")
    path = Path(args.data)
    return (str(path.resolve()), path.name) if path.exists() else (args.data, args.data)


def _recipe(args: argparse.Namespace, rule: str, structure: str, percent: int) -> Recipe:
    settings = [*args.set, f"epochs={args.epochs}"]
    if rule == "dense":
        return find_recipe(f"{args.recipes}-dense").override(settings)
    # The built-in recipe of a near sparsity serves any.
    built_in = find_recipe(f"{args.recipes}-{rule}90")
    mark = "" if structure == "unstructured" else f"_{structure.replace(':', 'of')}"
    return built_in.override(
        [
            f"name={args.recipes}-{rule}{percent}{mark}",
            f"sparsity={percent / 100}",
            f"structure={structure}",
            "dense=stem",
            *settings,
        ]
    )


def _tell(args: argparse.Namespace, lines: list[Line]) -> None:
    results = [line.results() for line in lines]
    rows = [_figures(line, found) for line, found in zip(lines, results, strict=True)]
    every = [result for found in results for result in found]
    undone = sum(job.result() is None for line in lines for job in line.jobs)
    notes = [f"{args.epochs} epochs; the first convolution is dense in every sparse run"]
    if every:
        images = sorted({f"{result['model']['training_images']:,}" for result in every})
        notes.append(f"{', '.join(images)} training images; {every[0]['id']['n']:,} test images")
    notes += [f"{undone} runs are not there yet"] if undone else []
    notes.append(environment_note(every))
    base, _ = _base(args)
    grid = Grid(
        title=f"Test accuracy against structure, %, {args.recipes} on {base}; ± over seeds",
        columns=("rule", "structure", "sparsity", "seeds", "accuracy", "ECE"),
        rows=[
            (
                TITLES[row["rule"]],
                row["structure"],
                shown(row["sparsity"]),
                str(row["accuracy"]["n"]),
                shown(row["accuracy"]),
                shown(row["ece"], scale=1, digits=4),
            )
            for row in rows
        ],
        notes=notes,
        texts=2,
    )
    plain = {"title": grid.title, "environment": environment(), "notes": notes, "rows": rows}
    write_json(args.out / "structures.json", plain)
    write_text(args.out / "structures.md", grid.markdown())
    if every:
        write_bytes(args.out / "structures.png", _picture(rows, grid.title))
    grid.show()


def _figures(line: Line, found: list[dict]) -> dict[str, Any]:
    return {
        "rule": line.rule,
        "structure": line.structure,
        "kind": line.kind,
        "percent": line.percent,
        "reason": line.reason or None,
        "sparsity": summary([r["model"]["sparsity"] for r in found]),
        "accuracy": summary([r["id"]["accuracy"] for r in found]),
        "ece": summary([r["id"]["ece"] for r in found]),
        "flops": summary([r["model"]["flops"] for r in found]),
    }


def _picture(rows: list[dict[str, Any]], title: str) -> bytes:
    """Accuracy against sparsity, a line a structure, a panel a rule; dense as a grey band."""
    import io

    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    there = [row for row in rows if row["accuracy"]["mean"] is not None]
    percents = sorted({row["percent"] for row in there if row["rule"] != "dense"})
    kinds = list(dict.fromkeys(row["kind"] for row in there if row["rule"] in RULES))
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for panel, rule in zip(panels, RULES, strict=True):
        _dense_band(panel, there)
        lines = [*((rule, kind, kind, "o-") for kind in kinds), GMP]
        for i, (who, kind, label, style) in enumerate(lines):
            own = [row for row in there if (row["rule"], row["kind"]) == (who, kind)]
            # Side by side, so that the bars can be told apart.
            shift = 0.12 * (i - (len(lines) - 1) / 2)
            panel.errorbar(
                [percents.index(row["percent"]) + shift for row in own],
                [100 * row["accuracy"]["mean"] for row in own],
                [100 * (row["accuracy"]["sd"] or 0) for row in own],
                fmt=style, capsize=3, markersize=4, linewidth=1.2, label=label,
            )  # fmt: skip
        panel.set_xticks(range(len(percents)), [f"{percent}%" for percent in percents])
        panel.set_xlabel("sparsity")
        panel.set_title(TITLES[rule], fontsize=10)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.suptitle(title, fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
    return file.getvalue()


def _dense_band(panel: Any, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["rule"] == "dense":
            mean, sd = row["accuracy"]["mean"], row["accuracy"]["sd"] or 0
            panel.axhspan(100 * (mean - sd), 100 * (mean + sd), color="0.85")
            panel.axhline(100 * mean, color="0.5", linewidth=1, label="dense")


if __name__ == "__main__":
    sys.exit(main())
