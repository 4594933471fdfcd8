"""Recipes beside each other, trained equally over seeds: accuracy, ECE, AUROC near and far.

    python benchmarks/compare.py --recipe mnist-cnn-rigl95-moon --recipe mnist-cnn-rigl95 \\
        --seeds 3 --set data.train='mnist.npz#train' --id 'mnist.npz#test' \\
        --near notmnist='notmnist_test.npz#test' --far dtd='dtd10_test.npz#test' --out runs/compare

Every run that is complete under --out is kept, and one that was interrupted is taken up again,
so the command can be repeated until it is done. --jobs runs so many side by side. The table
gives mean and standard deviation (n - 1) over the seeds; `compare.json` under --out holds every
figure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs import Job, TestSets
from pool import Pool, StoppedError
from spread import Grid, environment, environment_note, figures, shown, summary

from moon.cli.options import named_sources
from moon.errors import MoonError
from moon.files import write_json
from moon.trainer.recipes import find_recipe


def main(words: list[str] | None = None) -> int:
    args = _arguments(words)
    try:
        rows = {name: _jobs(args, name) for name in args.recipe}
        todo = [job for jobs in rows.values() for job in jobs if job.todo]
        failures = Pool(args.jobs, lambda text: print(text, file=sys.stderr, flush=True)).run(todo)
        found = {name: [r for job in jobs if (r := job.result())] for name, jobs in rows.items()}
        write_json(Path(args.out) / "compare.json", {"environment": environment(), "runs": found})
    except StoppedError:
        print("compare: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except MoonError as error:
        print(f"compare: {error}", file=sys.stderr)
        return error.exit_code
    _show(found)
    for name, reason in failures.items():
        print(f"compare: {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", action="append", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--id", required=True, metavar="SOURCE")
    parser.add_argument("--near", action="append", default=[], metavar="NAME=SOURCE")
    parser.add_argument("--far", action="append", default=[], metavar="NAME=SOURCE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", required=True)
    return parser.parse_args(words)


def _jobs(args: argparse.Namespace, name: str) -> list[Job]:
    near, far = named_sources("--near", args.near), named_sources("--far", args.far)
    recipe = find_recipe(name).override(args.set)
    return [
        Job(
            name=f"{recipe.name}-seed{seed}",
            recipe=recipe.override([f"seed={seed}"]),
            out=Path(args.out),
            train_as=recipe.data.train,
            sets=TestSets(known=args.id, near=near, far=far),
            device=args.device,
        )
        for seed in range(args.seeds)
    ]


def _show(found: dict[str, list[dict]]) -> None:
    measured = {name: figures(results) for name, results in found.items()}
    scores = sorted({score for one in measured.values() for score in one["scores"]})
    nothing = summary([])
    rows = [
        (
            name,
            str(one["accuracy"]["n"]),
            shown(one["accuracy"]),
            shown(one["ece"]),
            *(
                " / ".join(shown(pair[group]) for group in ("near", "far"))
                for pair in (one["scores"].get(s, dict.fromkeys(("near", "far"), nothing))
                             for s in scores)
            ),
        )
        for name, one in measured.items()
    ]  # fmt: skip
    Grid(
        title="mean ± standard deviation over seeds, in %; AUROC near / far",
        columns=("recipe", "seeds", "accuracy", "ECE", *scores),
        rows=rows,
        notes=[environment_note([result for results in found.values() for result in results])],
    ).show()


if __name__ == "__main__":
    sys.exit(main())
