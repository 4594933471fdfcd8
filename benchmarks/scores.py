"""Every score of every run on the same images: AUROC and FPR@95 near and far, by recipe.

    python benchmarks/scores.py runs/a-seed0 runs/a-seed1 runs/b-seed0 runs/b-seed1 \\
        --id 'mnist.npz#test' --near notmnist='notmnist_test.npz#test' \\
        --far dtd='dtd10_test.npz#test' --jpeg 75 --out runs/scores

RUN is a folder of `moon train`. Each is exported with every score that it can carry, fitted to its
own training images, and evaluated as `moon eval` does; with --jpeg also on the same sets all
re-encoded as JPEG of that quality (4:2:0), so that no set can be told from another by how it was
compressed. Runs that differ in their seed alone are one recipe: the tables have mean ± standard
deviation (n - 1) over them. --odin adds ODIN, which needs gradients and so runs in PyTorch on the
unpacked checkpoint, some ten times as long.

FPR@95 is in the tables as `moon eval` prints it, unknown images accepted when 95% of the known
ones are (`fpr95_id_pos`); the JSON has the other convention too. Under --out each run has a folder
with its bundle and its reports, and `scores.json` and `scores.md` hold the tables. What is done
is kept, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jobs import TestSets, identity
from scores_view import grids
from spread import environment, summary

import moon
from moon.bundle import Bundle
from moon.cli.options import named_sources, spread
from moon.data.load import stream
from moon.data.source import Source, open_source
from moon.errors import DataError, MoonError, UsageError
from moon.evaluation.corruptions import reencoded
from moon.evaluation.evaluate import evaluate
from moon.evaluation.measure import GROUPS, score_figures
from moon.evaluation.metrics import OOD_METRICS
from moon.evaluation.observe import Observed, sample
from moon.evaluation.odin import odin
from moon.export.to_bundle import to_bundle
from moon.files import canonical_json, sha256_bytes, write_json, write_text
from moon.scores import SCORE_TABLE
from moon.trainer.checkpoint import Checkpoint

ODIN = "odin"
BATCH = 64
Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained run and where its results go.

    Attributes:
        name: of its folder.
        path: that holds checkpoint.json.
        recipe: hash of its recipe were its seed 0.
        title: the recipe's name.
        out: its folder of results.
    """

    name: str
    path: Path
    recipe: str
    title: str
    out: Path
    versions: Mapping[str, str]

    @classmethod
    def at(cls, given: str, out: Path) -> Run:
        """The run at ``given``, or in the folder ``run`` there.

        Raises:
            TrainingError: there is none.
        """
        folder = Path(given)
        inner = folder / "run"
        path = inner if (inner / "checkpoint.json").is_file() else folder
        checkpoint = Checkpoint.load(path)
        name = (path.resolve().parent if path.name == "run" else path.resolve()).name
        return cls(
            name=name,
            path=path,
            recipe=replace(checkpoint.recipe, seed=0).hash,
            title=checkpoint.recipe.name,
            out=out / name,
            versions=checkpoint.versions,
        )

    def bundle(self, data: str | None) -> Bundle:
        """With all scores; exported unless it was, from these weights by this release."""
        facts = {"weights": identity(self.path), "moon": moon.__version__, "data": data}
        record, folder = self.out / "exported.json", self.out / "bundle"
        if _read(record) != facts or not folder.is_dir():
            _say(f"{self.name}: exporting")
            to_bundle(self.path, folder, carry=("all",), data=data, force=True)
            write_json(record, facts)
        return Bundle.open(folder)


def main(words: Sequence[str] | None = None) -> int:
    args = _arguments(words)
    try:
        result = run(args)
    except MoonError as error:
        print(f"scores: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("scores: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    for grid in grids(result):
        grid.show()
    return 0


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--id", required=True, metavar="SOURCE")
    parser.add_argument("--near", action="append", default=[], metavar="NAME=SOURCE")
    parser.add_argument("--far", action="append", default=[], metavar="NAME=SOURCE")
    parser.add_argument("--jpeg", type=int, metavar="Q", help="also re-encoded at this quality")
    parser.add_argument("--odin", action="store_true", help="ODIN too, in PyTorch")
    parser.add_argument("--data", metavar="SOURCE", help="held-out images to export with; "
                        "default each run's validation split")  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many images a set")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="runs/scores", metavar="DIR")
    parser.add_argument("--json", metavar="FILE", help="default: scores.json under --out")
    return parser.parse_args(spread(sys.argv[1:] if words is None else words))


def run(args: argparse.Namespace) -> Figures:
    """Export, evaluate, summarise, and write scores.json and scores.md."""
    out = Path(args.out)
    near, far = named_sources("--near", args.near), named_sources("--far", args.far)
    sets = TestSets(known=args.id, near=near, far=far, limit=args.limit)
    if not near and not far:
        raise UsageError("there are no unknown images", remedy="Give --near or --far NAME=SOURCE")
    runs = [Run.at(given, out) for given in args.runs]
    names = [one.name for one in runs]
    if len(set(names)) != len(names):
        raise UsageError("two runs have the same name", remedy="Name their folders differently")
    ways = {"plain": sets}
    if args.jpeg is not None:
        ways["jpeg"] = replace(sets, jpeg=args.jpeg)
    found = {}
    for one in runs:
        bundle = one.bundle(args.data)
        found[one.name] = {
            way: measured(one, bundle, asked, args.threads, args.odin)
            for way, asked in ways.items()
        }
    result = {
        "environment": environment(),
        "sets": sets.to_json(),
        "jpeg": args.jpeg,
        "recipes": [_recipe(members, found) for members in _by_recipe(runs)],
    }
    write_json(args.json or out / "scores.json", result)
    write_text(out / "scores.md", "\n".join(grid.markdown() for grid in grids(result)))
    return result


def measured(run: Run, bundle: Bundle, sets: TestSets, threads: int, with_odin: bool) -> Figures:
    """Accuracy, ECE and every score's figures of one run, as shown one way."""
    way = "plain" if sets.jpeg is None else f"jpeg{sets.jpeg}"
    _say(f"{run.name}: evaluating, {way}")
    report = evaluate(
        bundle, id=sets.known, near=sets.near, far=sets.far, limit=sets.limit, jpeg=sets.jpeg,
        threads=threads, corruptions=0, resamples=0, out=run.out / way,
    ).to_json()  # fmt: skip
    scores = dict(report["scores"])
    if with_odin:
        scores[ODIN] = odin_figures(run, sets)
    return {"id": report["id"], "model": report["model"], "scores": scores,
            "warnings": report["warnings"]}  # fmt: skip


def odin_figures(run: Run, sets: TestSets) -> Figures:
    """Of ODIN at its paper's settings; kept beside the reports."""
    facts = {"weights": identity(run.path), "moon": moon.__version__, "sets": sets.contents(),
             "limit": sets.limit, "jpeg": sets.jpeg}  # fmt: skip
    record = run.out / f"odin-{sha256_bytes(canonical_json(facts))[:12]}.json"
    there = _read(record)
    if isinstance(there, dict):
        return there
    checkpoint = Checkpoint.load(run.path)
    _say(f"{run.name}: odin")
    known = _odin(checkpoint, sets.known, sets)
    groups = {
        group: {name: _odin(checkpoint, spec, sets) for name, spec in members.items()}
        for group, members in zip(GROUPS, (sets.near, sets.far), strict=True)
    }
    figures = score_figures(ODIN, known, groups, None, 0)
    write_json(record, figures)
    return figures


def _odin(checkpoint: Checkpoint, spec: str, sets: TestSets) -> Observed:
    import torch

    source: Source = open_source(spec)
    if len(source) == 0:
        raise DataError(f"{spec} holds no images")
    model, preprocess = checkpoint.model(), checkpoint.preprocess
    parts = []
    for _, pixels in stream(source, preprocess, BATCH, indices=sample(source, sets.limit)):
        if sets.jpeg is not None:
            pixels = np.stack([reencoded(image, sets.jpeg) for image in pixels])
        inputs = torch.from_numpy(preprocess.normalise(pixels))
        parts.append(
            odin(model, inputs, unknown_index=checkpoint.unknown_index, std=preprocess.std)
        )
    values = np.concatenate(parts)
    n = len(values)
    return Observed(
        {ODIN: np.where(np.isfinite(values), values, -np.inf)}, {},
        np.ones(n, bool), np.zeros(n, np.int64), np.zeros(n),
    )  # fmt: skip


def _by_recipe(runs: Sequence[Run]) -> list[list[Run]]:
    groups: dict[str, list[Run]] = {}
    for one in runs:
        groups.setdefault(one.recipe, []).append(one)
    return list(groups.values())


def _recipe(members: Sequence[Run], found: Mapping[str, Figures]) -> Figures:
    """Every figure over the runs of one recipe, and of each run by itself."""
    ways = list(found[members[0].name])
    return {
        "name": members[0].title,
        "sha256": members[0].recipe,
        "versions": [dict(one.versions) for one in members],
        **{way: _summaries([found[one.name][way] for one in members]) for way in ways},
        "runs": {one.name: found[one.name] for one in members},
    }


def _summaries(results: Sequence[Figures]) -> Figures:
    there = {name for result in results for name in result["scores"]}
    ordered = [name for name in (*SCORE_TABLE, ODIN) if name in there]
    return {
        "accuracy": summary([result["id"]["accuracy"] for result in results]),
        "ece": summary([result["id"]["ece"] for result in results]),
        "scores": {
            name: {
                group: {
                    metric: summary(
                        [(r["scores"].get(name, {}).get(group) or {}).get(metric) for r in results]
                    )
                    for metric in OOD_METRICS
                }
                for group in GROUPS
            }
            for name in ordered
        },
    }


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
