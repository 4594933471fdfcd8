"""Recipes beside each other, trained equally over seeds: accuracy, ECE, AUROC near and far.

    python benchmarks/compare.py --recipe mnist-cnn-rigl95-moon --recipe mnist-cnn-rigl95 \\
        --seeds 3 --set data.train='mnist.npz#train' --id 'mnist.npz#test' \\
        --near notmnist='notmnist_test.npz#test' --far dtd='dtd10_test.npz#test' --out runs/compare

Every run that is complete under --out is kept, and one that was interrupted is taken up again,
so the command can be repeated until it is done. The table gives mean and standard deviation
(n - 1) over the seeds; `compare.json` under --out holds every figure.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import moon
from moon.cli.options import named_sources
from moon.errors import MoonError
from moon.evaluation.evaluate import evaluate
from moon.files import write_json
from moon.trainer.recipes import find_recipe


def main() -> int:
    args = _arguments()
    try:
        rows = {
            recipe: [_one(args, recipe, seed) for seed in range(args.seeds)]
            for recipe in args.recipe
        }
    except MoonError as error:
        print(f"compare: {error}", file=sys.stderr)
        return error.exit_code
    write_json(Path(args.out) / "compare.json", {"environment": _environment(), "runs": rows})
    _show(rows)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", action="append", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--id", required=True, metavar="SOURCE")
    parser.add_argument("--near", action="append", default=[], metavar="NAME=SOURCE")
    parser.add_argument("--far", action="append", default=[], metavar="NAME=SOURCE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def _one(args: argparse.Namespace, name: str, seed: int) -> dict[str, object]:
    """Train, export and evaluate one recipe with one seed, or read what an earlier call left."""
    folder = Path(args.out) / f"{name}-seed{seed}"
    run, bundle, report = folder / "run", folder / "bundle", folder / "report"
    recipe = find_recipe(name).override([*args.set, f"seed={seed}"])
    # A finished run is read, one that was cut short goes on; another recipe there is an error.
    moon.fit(recipe, run, device=args.device, resume=True)
    if not bundle.exists():
        moon.to_bundle(run, bundle)
    if not (report / "report.json").exists():
        near, far = named_sources("--near", args.near), named_sources("--far", args.far)
        evaluate(bundle, id=args.id, near=near, far=far, out=report)
    return dict(json.loads((report / "report.json").read_text()))


def _show(rows: dict[str, list[dict]]) -> None:
    table = Table(title="mean ± standard deviation over seeds, in %; AUROC near / far")
    table.add_column("recipe")
    for column in ("seeds", "accuracy", "ECE"):
        table.add_column(column, justify="right")
    scores = sorted({score for reports in rows.values() for r in reports for score in r["scores"]})
    for score in scores:
        table.add_column(score, justify="right")
    for name, reports in rows.items():
        cells = [
            " / ".join(
                _spread([r["scores"][score][kind]["auroc"] for r in reports])
                for kind in ("near", "far")
                if reports[0]["scores"][score][kind]
            )
            if all(score in r["scores"] for r in reports)
            else "-"
            for score in scores
        ]
        accuracy = _spread([r["id"]["accuracy"] for r in reports])
        table.add_row(
            name, str(len(reports)), accuracy, _spread([r["id"]["ece"] for r in reports]), *cells
        )
    Console(width=200).print(table)


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{100 * statistics.fmean(values):.2f}±{100 * deviation:.2f}"


def _environment() -> dict[str, str]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {"torch": torch.__version__, "python": platform.python_version(), "device": device}


if __name__ == "__main__":
    sys.exit(main())
