"""A whole source of images as a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moon.bundle import Bundle
from moon.data.source import open_source
from moon.errors import UsageError
from moon.progress import Progress, silent
from moon.runtime.backend import DEFAULT
from moon.runtime.cores import usable_cores
from moon.runtime.offline import local
from moon.runtime.offline.job import PART, Job, Parts, folder_of, identity, schema
from moon.runtime.offline.rows import columns
from moon.runtime.offline.worker import Worker

__all__ = ["Summary", "score_source"]

_ERRORS_KEPT = 3
# More threads than this seldom have images to decode.
_MOST_WORKERS = 16


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is in a table.

    Attributes:
        accept, abstain, failed: numbers of images.
        errors: of the first few images that could not be read.
        continued: images that an earlier run had decided.
    """

    accept: int
    abstain: int
    failed: int
    errors: tuple[str, ...]
    continued: int

    @property
    def rows(self) -> int:
        """Images in all."""
        return self.accept + self.abstain + self.failed


def _silent(text: str) -> None:
    """Nobody is told."""


def score_source(
    bundle: str | os.PathLike[str],
    source: str,
    out: str | os.PathLike[str],
    *,
    engine: Literal["local", "ray"] = "local",
    backend: str = DEFAULT,
    threads: int = 1,
    workers: int | None = None,
    threshold: float | None = None,
    probabilities: bool = False,
    restart: bool = False,
    progress: Progress = silent,
    warn: Callable[[str], None] = _silent,
    say: Callable[[str], None] = _silent,
) -> Summary:
    """Write a row for every image of a source, in its order.

    Parts that are done lie in ``OUT.parts`` until the table is complete: the same call goes on
    with them after an interruption. The rows depend on neither engine, workers nor interruptions.

    Args:
        bundle: a calibrated bundle's folder.
        source: of images.
        out: the Parquet file; columns input, label, decision, reason, score, threshold, p_value,
            one a carried score, p_CLASS where wanted, error.
        engine: ``local`` for threads of this process, ``ray`` for actors of Ray Data; these must
            see the bundle, the source and the folder of ``out``.
        backend: see :data:`moon.runtime.backend.NAMES`.
        threads: for one inference.
        workers: parts decided at a time; default one a usable core, with ray one for every
            ``threads`` CPUs of the cluster.
        threshold: accept by this instead of the calibrated threshold.
        probabilities: add the known classes' probabilities.
        restart: throw away the parts of an interrupted run.
        progress: told how many images are done.
        warn: told of what voids a promise or costs speed.
        say: told where it goes on, and on what.

    Raises:
        UsageError: an argument is wrong, or there are parts of another table.
        MoonError: the bundle, the source or the backend fails, or a file cannot be written; what
            is done is kept.
    """
    out = Path(out)
    if out.exists() and not out.is_file():
        what = "a folder" if out.is_dir() else "not a plain file"
        raise UsageError(f"{out} is {what}", remedy="Give --out the name of a file, FILE.parquet")
    if workers is not None and workers < 1:
        raise UsageError(f"workers must be 1 or more, not {workers}")
    opened, images = Bundle.open(bundle), open_source(source)
    job = Job(
        home=str(Path.cwd()),
        bundle=str(Path(bundle).resolve()),
        model=opened.manifest.sha256,
        source=source,
        images=len(images),
        listing=identity(images),
        backend=backend,
        threads=threads,
        threshold=threshold,
        probabilities=probabilities,
        columns=columns(opened.manifest, probabilities=probabilities),
        part=PART,
    )
    schema(job.columns)  # a missing package shows before anything is written
    if engine == "local":
        worker = Worker(job, folder_of(out.resolve()), warn)  # so does what cannot run here
    with Parts(out, job, restart=restart) as parts:
        missing = parts.missing
        continued = job.images - sum(len(job.positions(part)) for part in missing)
        if continued and missing:
            say(f"going on: {continued:,} of {job.images:,} images were decided before")
        progress(continued, job.images, "Scoring")
        if engine == "local":
            done = local.decide(worker, missing, workers or min(_MOST_WORKERS, usable_cores()))
        else:
            from moon.runtime.offline import with_ray

            done = with_ray.decide(job, parts.folder, missing, workers, say)
        _follow(done, job, continued, progress)
        return _summary(parts.join(), continued if missing else 0)


def _follow(done: Any, job: Job, images: int, progress: Progress) -> None:
    with closing(done):
        for part in done:
            images += len(job.positions(part))
            progress(images, job.images, "Scoring")


def _summary(tables: Iterator[Any], continued: int) -> Summary:
    counts = {"accept": 0, "abstain": 0, "failed": 0}
    errors: list[str] = []
    for table in tables:
        for decision, error in zip(
            table.column("decision").to_pylist(), table.column("error").to_pylist(), strict=True
        ):
            counts[decision or "failed"] += 1
            if error and len(errors) < _ERRORS_KEPT:
                errors.append(error)
    return Summary(**counts, errors=tuple(errors), continued=continued)
