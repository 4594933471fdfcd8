"""Parts decided by Ray Data: an actor for each worker, on as many machines as the cluster has.

Actors write their parts themselves, into a folder that all machines see; what passes through Ray
are numbers. A part that an actor did not finish is made again by another.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError, MissingExtraError, MoonError
from moon.runtime.offline.job import Job

__all__ = ["decide"]


class _Actor:
    """What `Worker` is, for Ray."""

    def __init__(self, job: Job, folder: str) -> None:
        from moon.runtime.offline.worker import Worker

        self._error: MoonError | None = None
        with suppress(OSError):  # the source may have an absolute name
            os.chdir(job.home)
        try:
            self._worker = Worker(job, Path(folder), lambda text: None)
        except MoonError as error:  # Ray would begin it anew again and again
            self._error = error

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, Any]:
        errors = []
        for number in batch["id"]:
            try:
                if self._error is not None:
                    raise self._error
                self._worker.part(int(number))
                errors.append("")
            except MoonError as error:
                errors.append(f"{error.cause}\n{error.remedy}")
        return {"id": batch["id"], "error": np.array(errors, dtype=object)}


def _actor(job: Job, folder: str) -> type:
    """With its arguments within: those that Ray keeps apart can be lost before an actor is."""

    class Score(_Actor):
        def __init__(self) -> None:
            super().__init__(job, folder)

    return Score


def decide(
    job: Job, folder: Path, parts: Sequence[int], workers: int | None, say: Callable[[str], None]
) -> Iterator[int]:
    """Decide parts by Ray Data.

    Args:
        job: what they are of.
        folder: of the parts.
        parts: their numbers.
        workers: actors; default one for every ``job.threads`` CPUs of the cluster.
        say: told where it runs.

    Yields:
        The number of each when it is done.

    Raises:
        MissingExtraError: Ray is not installed.
        BackendError: Ray cannot be started, or gives up.
        MoonError: what an actor met.
    """
    # Ray would otherwise tell its makers that it runs.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # What it logs as an error of every pool of actors, it calls harmless where that is explained.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        ray: Any = import_module("ray")  # its types differ from release to release
        import_module("ray.data")
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "moon score --engine ray") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    started = not ray.is_initialized()
    if started:
        _start(ray)
    try:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        cores = max(1, job.threads)
        actors = workers or max(1, cpus // cores)
        machines = len([node for node in ray.nodes() if node["Alive"]])
        say(f"ray: actors: {actors}, machines: {machines}, CPUs: {cpus}")
        yield from _run(ray, job, folder, parts, min(actors, len(parts)), cores)
    finally:
        if started:
            ray.shutdown()


def _start(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(
            address=address,
            configure_logging=True,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **({} if address else {"include_dashboard": False}),
        )
    except Exception as error:  # what it raises differs by what is wrong
        where = f"the cluster at {address}" if address else "a cluster of this machine"
        raise BackendError(
            f"Ray cannot start {where}: {error}",
            remedy="Check RAY_ADDRESS, or use --engine local",
        ) from error


def _run(
    ray: Any, job: Job, folder: Path, parts: Sequence[int], actors: int, cores: int
) -> Iterator[int]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    numbers = ray.data.from_items([{"id": part} for part in parts], override_num_blocks=len(parts))
    found = numbers.map_batches(
        _actor(job, str(folder)),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cores,
    )  # an actor that is lost is begun anew, and what it had to do given to another
    try:
        for batch in found.iter_batches(batch_size=1, prefetch_batches=0):
            for number, error in zip(batch["id"], batch["error"], strict=True):
                if error:
                    cause, _, remedy = str(error).partition("\n")
                    raise MoonError(cause, remedy=remedy)
                yield int(number)
    except ray.exceptions.RayError as error:
        raise BackendError(
            f"Ray gave up: {error}",
            remedy="What is done is kept: run the same command again",
        ) from error
