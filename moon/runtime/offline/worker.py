"""Who decides parts: a thread here, or an actor on another machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moon.bundle import Bundle
from moon.data.source import open_source
from moon.errors import BundleError, DataError
from moon.runtime.offline.job import Job, identity, write_part
from moon.runtime.offline.rows import rows
from moon.runtime.predictor import Predictor

__all__ = ["Worker"]


class Worker:
    """Makes parts of a job. Threads may share one.

    Args:
        job: what it is of.
        folder: of the parts.
        warn: told of what may make the backend slower than expected.

    Raises:
        BundleError: the bundle is not the one of the job.
        DataError: the source does not list what it did.
        BackendError: the backend cannot run here.
    """

    def __init__(self, job: Job, folder: Path, warn: Callable[[str], None]) -> None:
        self._job, self._folder = job, folder
        bundle = Bundle.open(job.bundle)
        if bundle.manifest.sha256 != job.model:
            raise BundleError(
                f"{job.bundle} was changed after the work began",
                remedy="Run the command again with --restart, for one table of one model",
            )
        self._images = open_source(job.source)
        if len(self._images) != job.images or identity(self._images) != job.listing:
            raise DataError(
                f"{job.source} does not list the images it did when the work began",
                remedy="Run the command again with --restart; with ray the images must lie where "
                "every machine sees them",
            )
        self._predictor = Predictor.open(
            bundle,
            backend=job.backend,
            threads=job.threads,
            threshold=job.threshold,
            warn=warn,
        )

    def part(self, number: int) -> None:
        """Decide the images of a part, and write it.

        Raises:
            MoonError: the source or the backend fails, or the part cannot be written.
        """
        job = self._job
        positions = job.positions(number)
        found = rows(self._predictor, self._images, positions, probabilities=job.probabilities)
        write_part(self._folder, job, number, list(found))
