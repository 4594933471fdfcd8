"""One run in a process of its own: trained, packed, measured, as a job file says.

    python benchmarks/worker.py JOB.json

Lines on stdout say how far it is. It ends when its stdin is closed, so that no worker outlives
the command that started it; what it had done by then is taken up again by the next.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

from jobs import identity, run_hash
from measure import measure

from moon.errors import MoonError, UsageError
from moon.files import write_json
from moon.trainer.checkpoint import Checkpoint
from moon.trainer.compact import load_compact, save_compact
from moon.trainer.fit import EpochRecord, fit
from moon.trainer.recipe import Recipe


def main() -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        do(job)
    except MoonError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def do(job: dict) -> None:
    """Train, pack and measure, as far as the job asks for it."""
    checkpoint = _checkpoint(job)
    if job["pack"]:
        size = save_compact(checkpoint, job["pack"])
        of = {"run": identity(Path(job["weights"])), "file": identity(Path(job["pack"]))}
        write_json(job["packed"], of)
        _say(f"packed into {job['pack']}, {size / 1e6:.1f} MB")
    if job["result"]:
        sets = job["sets"]
        figures = measure(
            checkpoint,
            sets["id"],
            {group: sets[group] for group in ("near", "far")},
            device=_device(job["device"]),
            limit=sets["limit"],
            jpeg=sets["jpeg"],
            say=_say,
        )
        facts = {
            "key": job["key"],
            "identity": identity(Path(job["weights"])),
            "contents": job["contents"],
        }
        write_json(job["result"], {**facts, **figures})


def _checkpoint(job: dict) -> Checkpoint:
    """The weights: trained here, or of the file or finished run that the job names."""
    weights = Path(job["weights"])
    if job["changed"]:
        raise UsageError(
            f"{weights} was begun with other training images than are there now",
            remedy="Restore them, or give another --out",
        )
    if job["train"]:
        recipe = Recipe.from_dict(job["recipe"])
        return fit(recipe, weights, device=job["device"], resume=True, report=_report)
    checkpoint = load_compact(weights) if weights.is_file() else Checkpoint.load(weights)
    if run_hash(checkpoint.recipe, job["train_as"]) != job["run_hash"]:
        wanted = Recipe.from_dict(job["recipe"])
        raise UsageError(
            f"{weights} was trained by another recipe: {_difference(checkpoint.recipe, wanted)}",
            remedy="Give the options it was trained with, or another --out",
        )
    return checkpoint


def _difference(there: Recipe, here: Recipe) -> str:
    same = replace(there, name=here.name, data=replace(there.data, train=here.data.train))
    pairs = zip(same.resolved().to_toml().splitlines(), here.resolved().to_toml().splitlines(),
                strict=False)  # fmt: skip
    return next((f"{a} there, {b} here" for a, b in pairs if a != b), "they differ")


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _report(record: EpochRecord) -> None:
    _say(
        f"epoch {record.epoch}/{record.epochs}: accuracy {record.accuracy:.2%}, "
        f"{record.seconds:.1f} s"
    )


def _say(text: str) -> None:
    print(text, flush=True)


def _end_with_parent() -> None:
    # Not sys.stdin, whose lock an ordinary end would wait for.
    while os.read(0, 4096):
        pass
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
