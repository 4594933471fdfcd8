"""``moon score``: decide a whole source of images into a Parquet table."""

from __future__ import annotations

__all__ = ["Engine", "columns", "score"]

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from moon.cli.console import note, output, print_json, working
from moon.cli.options import AsJson, Backend, Debug, not_yet
from moon.cli.text import grid, share
from moon.errors import ImageError, MoonError, UsageError

_CHUNK = 256
_NAMED_IN_LINE = 3


class Engine(str, Enum):
    local = "local"
    ray = "ray"


def score(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A calibrated bundle.")],
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The images to decide.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.parquet", help="The table to write.")],
    engine: Annotated[
        Engine, typer.Option("--engine", help="local: this machine; ray: not in this version.")
    ] = Engine.local,
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
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a row an image: input, label, decision, score, threshold, p_value, every score.

    An image that cannot be read gets a row with its error; the others are decided, and the
    exit status is 1. The file appears when it is complete.
    """
    if engine is Engine.ray:
        raise not_yet("--engine ray", "Leave it out, or use --engine local")
    if out.exists() and not out.is_file():
        what = "a folder" if out.is_dir() else "not a plain file"
        raise UsageError(f"{out} is {what}", remedy="Give --out the name of a file, FILE.parquet")

    from moon.data.source import open_source
    from moon.runtime.predictor import Predictor

    with working("Opening the bundle") as progress:
        predictor = Predictor.open(bundle, backend=backend, threshold=threshold, warn=_warn)
        images = open_source(source)
        table = columns(predictor, probabilities=probabilities)
        tally = {"accept": 0, "abstain": 0, "failed": 0}
        failures: list[str] = []
        with _parquet(out, table) as write:
            for start in range(0, len(images), _CHUNK):
                progress(start, len(images), "Scoring")
                stop = min(start + _CHUNK, len(images))
                rows = list(_rows(predictor, images, range(start, stop), probabilities))
                write(rows)
                for row in rows:
                    tally[row["decision"] or "failed"] += 1
                    failures += [row["error"]] if row["error"] else []
    _report(out, tally, failures, as_json=as_json)


def _warn(text: str) -> None:
    note(f"warning: {text}")


def columns(predictor: Any, *, probabilities: bool) -> dict[str, str]:
    """Column names and their types, in order."""
    manifest = predictor.bundle.manifest
    fixed = {
        "input": "string",
        "label": "string",
        "decision": "string",
        "reason": "string",
        "score": "float32",
        "threshold": "float32",
        "p_value": "float64",
    }
    scores = dict.fromkeys(manifest.scores, "float32")
    classes = {f"p_{name}": "float32" for name in manifest.classes} if probabilities else {}
    table = {**fixed, **scores, **classes, "error": "string"}
    if len(table) != len(fixed) + len(scores) + len(classes) + 1:
        raise UsageError(
            "a class name makes a column that is there already", remedy="Leave out --probabilities"
        )
    return table


def _rows(
    predictor: Any, images: Any, positions: range, probabilities: bool
) -> Iterator[dict[str, Any]]:
    import numpy as np

    good, prepared, errors = [], [], {}
    for position in positions:
        try:
            prepared.append(predictor.prepare(images.item(position)))
            good.append(position)
        except ImageError as error:
            errors[position] = str(error)
    decided = {}
    if good:
        outputs = predictor.raw(np.stack(prepared))
        names = [images.name(position) for position in good]
        extra = _extra(predictor, outputs, probabilities)
        for i, decision in enumerate(predictor.decisions(outputs, names)):
            decided[good[i]] = {
                **_row(decision),
                **{name: _finite(values[i]) for name, values in extra.items()},
            }
    for position in positions:
        if position in errors:
            yield {"input": images.name(position), "decision": None, "error": errors[position]}
        else:
            yield decided[position]


def _row(decision: Any) -> dict[str, Any]:
    plain = decision.to_json()
    return {
        "input": plain["input"],
        "label": plain["label"],
        "decision": plain["decision"],
        "reason": plain["reason"],
        "score": plain["score"]["value"],
        "threshold": plain["score"]["threshold"],
        "p_value": plain["p_value"],
        "error": None,
    }


def _extra(predictor: Any, outputs: Any, probabilities: bool) -> dict[str, Any]:
    from moon.scores import known_probabilities

    manifest = predictor.bundle.manifest
    extra = {name: outputs[f"score_{name}"] for name in manifest.scores}
    if probabilities:
        p_NK = known_probabilities(outputs["logits"], manifest.unknown_index)
        extra |= {f"p_{name}": p_NK[:, i] for i, name in enumerate(manifest.classes)}
    return extra


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _report(out: Path, tally: dict[str, int], failures: list[str], *, as_json: bool) -> None:
    rows = sum(tally.values())
    if as_json:
        print_json({"out": str(out), "rows": rows, **tally})
    else:
        table = grid("decision", "images", "share", right=("images", "share"))
        for name, number in tally.items():
            if number or name != "failed":
                table.add_row(name, f"{number:,}", share(number, rows))
        output().print(table)
        output().print(f"{rows:,} rows in {out}", soft_wrap=True, markup=False)
    for failure in failures[:_NAMED_IN_LINE]:
        note(failure)
    if failures:
        raise MoonError(
            f"{len(failures):,} of {rows:,} images could not be read",
            remedy="The column error says why; the others are decided",
        )


@contextmanager
def _parquet(path: Path, table: dict[str, str]) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Rows go into a file aside, which takes the name ``path`` when the block ends well."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in table.items()])
    target = path.resolve()
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("xb") as file:
            with parquet.ParquetWriter(file, schema) as writer:
                yield lambda rows: writer.write_table(pyarrow.Table.from_pylist(rows, schema))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    except OSError as error:
        raise MoonError(
            f"could not write {path}: {error.strerror or error}",
            remedy="Check the path, its rights and the space on its disk",
        ) from error
    finally:
        with suppress(OSError):  # it never came to be, or nothing can be done about it
            aside.unlink()
