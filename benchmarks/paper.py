"""The paper's comparisons, trained and evaluated here, beside the paper's own figures.

    python benchmarks/paper.py --list
    python benchmarks/paper.py --table 1 --data DIR --out runs/paper --jobs 4
    python benchmarks/paper.py --table digits --epochs 10 --device cpu

Tables, and which of their figures are the paper's: benchmarks/paper_tables.py. The sets, their
files under DIR, near and far: benchmarks/image_sets.py. Sets that are not there are left out of
the mean, and the table says so.

Runs are kept under --out, finished ones are reused and interrupted ones go on, so the command
can be repeated until it is done; runs that tables share are trained once. --jobs runs so many
side by side on one device. One that fails does not stop the others.

On two machines: `--train-only --checkpoints FOLDER` leaves a file of a few MB for each run,
`--evaluate-only --checkpoints FOLDER` measures them where the test images are.

The last table printed is also in table-NAME.json and table-NAME.md under --out.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import sys
from pathlib import Path

from image_sets import PROTOCOLS, Found, Places, listed
from jobs import Job, TestSets
from paper_tables import TABLES, PaperTable
from paper_view import Line, list_rows, tell_table, tell_trained
from pool import Pool, StoppedError
from spread import Grid, seeds

from moon.cli.options import named_sources
from moon.errors import MoonError, RecipeError, UsageError
from moon.scores import SCORES
from moon.trainer.recipe import Recipe


def main(words: list[str] | None = None) -> int:
    try:
        return _run(_arguments(words))
    except StoppedError:
        print("paper: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except MoonError as error:
        print(f"paper: {error}", file=sys.stderr)
        return error.exit_code


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", metavar="NAME", help=listed(TABLES))
    parser.add_argument("--list", action="store_true", help="tables, or the rows of one")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a folder of sets")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=SOURCE")
    parser.add_argument("--download", action="store_true", help="missing sets by torchvision")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), metavar="DIR")
    parser.add_argument("--seeds", default="0,1,2", help="default 0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--epochs", type=int, help="default: the recipe's; T_e and votes follow")
    parser.add_argument("--model", help="another model of the built-in recipes, such as cnn")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rows", metavar="PATTERN", help="labels or recipes, such as '*95*'")
    parser.add_argument("--score", default="msp", choices=list(SCORES), help="default msp")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N test images a set")
    parser.add_argument("--jpeg", type=int, metavar="Q", help="re-encode all test images alike")
    parser.add_argument("--checkpoints", type=Path, help="default OUT/checkpoints")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--train-only", action="store_true")
    only.add_argument("--evaluate-only", action="store_true")
    only.add_argument("--show", action="store_true", help="print what is there, run nothing")
    return parser.parse_args(words)


def _run(args: argparse.Namespace) -> int:
    if args.table is None:
        if args.list:
            return _list_tables(args)
        raise UsageError("which table?", remedy=f"--table one of {listed(TABLES)}; --list explains")
    table = _table(args.table)
    _check_measuring(args)
    sets, missing = _test_sets(args, table)
    lines = _lines(args, table, sets, missing)
    if args.list:
        list_rows(lines, missing)
        return 0
    failures: dict[str, str] = {}
    if not args.show:
        todo = [job for line in lines for job in line.jobs if job.todo not in ("", "not trained")]
        failures = Pool(args.jobs, _say).run(list({job.name: job for job in todo}.values()))
    if args.train_only:
        tell_trained(lines)
    else:
        tell_table(args, table, lines, missing)
    reasons = failures | {line.row.label: line.reason for line in lines if line.reason}
    for name, reason in reasons.items():
        print(f"paper: {name}: {reason}", file=sys.stderr)
    return 1 if reasons else 0


def _check_measuring(args: argparse.Namespace) -> None:
    """Find mistakes before hours of training that would show only after it."""
    seeds(args.seeds)
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit must be at least 1, got {args.limit}")
    if args.jpeg is not None and not 1 <= args.jpeg <= 100:
        raise UsageError(f"--jpeg must be a quality from 1 to 100, got {args.jpeg}")


def _table(name: str) -> PaperTable:
    if name not in TABLES:
        near = difflib.get_close_matches(name, TABLES, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(f"there is no table {name!r}", remedy=f"{hint}Choose {listed(TABLES)}")
    return TABLES[name]


def _places(args: argparse.Namespace) -> Places:
    given = named_sources("--source", args.source)
    return Places(folder=args.data, given=given, download=args.download)


def _test_sets(args: argparse.Namespace, table: PaperTable) -> tuple[TestSets | None, list[str]]:
    """What to measure on, and a line for every set that is not there."""
    protocol, places = PROTOCOLS[table.data], _places(args)
    known = places.find(protocol.known)
    near, no_near = places.find_all(protocol.near)
    far, no_far = places.find_all(protocol.far)
    missing = [f"near: {line}" for line in no_near] + [f"far: {line}" for line in no_far]
    if isinstance(known, str):
        return None, [f"test images: {known}", *missing]
    found = {"id": known, **near, **far}
    sets = TestSets(
        known=known.source,
        near={name: place.source for name, place in near.items()},
        far={name: place.source for name, place in far.items()},
        limit=args.limit,
        jpeg=args.jpeg,
        portable={name: place.portable for name, place in found.items()},
    )
    return sets, missing


def _training(args: argparse.Namespace, table: PaperTable) -> tuple[str, Found | str]:
    """The name of the training set, and its place, or why it is not there."""
    name = f"{PROTOCOLS[table.data].known}-train"
    for setting in reversed(args.set):
        key, _, source = setting.partition("=")
        if key.strip() == "data.train":
            return name, Found(source=source.strip(), portable=source.strip())
    return name, _places(args).find(name)


def _lines(
    args: argparse.Namespace, table: PaperTable, sets: TestSets | None, missing: list[str]
) -> list[Line]:
    name, train = _training(args, table)
    reason = ""
    if isinstance(train, str) and not (args.evaluate_only or args.show):
        reason = train
    elif sets is None and not args.train_only:
        reason = missing[0]
    stem = f"{table.data}-{args.model or table.model}"
    place = [f"data.train={train.source}"] if isinstance(train, Found) else []
    lines = []
    for row in table.rows:
        try:
            recipe = row.recipe(stem, [*args.set, *place], args.epochs)
        except RecipeError as error:
            lines.append(Line(row=row, recipe=None, reason=str(error)))
            continue
        if args.rows and not _matches(args.rows, row.label, recipe.name):
            continue
        jobs = () if reason else _jobs(args, recipe, name, sets)
        lines.append(Line(row=row, recipe=recipe, jobs=jobs, reason=reason))
    if not lines:
        raise UsageError(f"no row matches {args.rows!r}", remedy="See --list")
    return lines


def _matches(pattern: str, *names: str) -> bool:
    return any(pattern in name or fnmatch.fnmatch(name, pattern) for name in names)


def _jobs(
    args: argparse.Namespace, recipe: Recipe, train_as: str, sets: TestSets | None
) -> tuple[Job, ...]:
    packed = args.checkpoints or args.out / "checkpoints"
    return tuple(
        Job(
            name=f"{recipe.name}-seed{seed}",
            recipe=recipe.override([f"seed={seed}"]),
            out=args.out,
            train_as=train_as,
            train=not (args.evaluate_only or args.show),
            packed=packed if args.train_only or args.evaluate_only or args.show else None,
            sets=None if args.train_only else sets,
            device=args.device,
        )
        for seed in seeds(args.seeds)
    )


def _list_tables(args: argparse.Namespace) -> int:
    rows = []
    for name, table in TABLES.items():
        _, missing = _test_sets(args, table)
        _, train = _training(args, table)
        lacks = [*([f"training images: {train}"] if isinstance(train, str) else []), *missing]
        ours = "our grouping" if table.published else "not the paper's"
        what = "paper's figures" if table.numbered else ours
        rows.append(
            (name, table.title_of(None), str(len(table.rows)), what, f"{len(lacks)} sets missing")
        )
    columns = ("table", "what", "rows", "figures", "data")
    Grid(
        title="Tables", columns=columns, rows=rows, notes=("--table NAME --list: more",), texts=5
    ).show()
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
