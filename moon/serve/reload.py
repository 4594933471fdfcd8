"""Reload: a bundle that was replaced on disk is verified, warmed, and then answers.

Each worker looks at its bundles every second, and compares the hash that a manifest states of
itself. A new version is opened and checked whole and decides once in every size of batch, on a
thread, while the old one goes on answering; then it takes the name, between two requests. What was
asked of the old one is still answered by it. A bundle that cannot be opened, is not signed, or does
not fit is refused with a line in the log, and looked at again when any of its files has changed: a
copy that was not complete, or a signature that came later.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from moon.errors import MoonError
from moon.runtime.predictor import Predictor
from moon.serve.metrics import Metrics
from moon.serve.models import Model, Models
from moon.serve.settings import Served, Settings

__all__ = ["Reload", "open_served"]

EVERY_SECONDS = 1.0
# A manifest is some kilobytes; one of another size is for Bundle.open to refuse.
_MOST_BYTES = 64 << 20
logger = logging.getLogger("moon.serve")


def open_served(served: Served, settings: Settings) -> Predictor:
    """The predictor of a bundle that is served.

    Raises:
        MoonError: it cannot be opened, or cannot run here.
    """
    return Predictor.open(
        served.bundle,
        backend=settings.backend,
        threshold=settings.threshold,
        key=settings.key,
        warn=lambda _: None,  # the supervisor has warned
    )


@dataclass(frozen=True)
class _Found:
    """What a folder holds, without reading its files.

    Attributes:
        stated: the hash that its manifest states of itself.
        files: names, sizes and times of change.
    """

    stated: str
    files: tuple[tuple[str, int, int], ...]


@dataclass
class _Watched:
    """A bundle's folder.

    Attributes:
        answers: the hash that the manifest of what answers states of itself.
        refused: what was found when it was last refused.
    """

    served: Served
    answers: str
    refused: _Found | None = None


@dataclass
class Reload:
    """Looks after a worker's bundles.

    Args:
        models: to be changed.
        settings: what is served.
        metrics: count what was found.
    """

    models: Models
    settings: Settings
    metrics: Metrics
    _task: asyncio.Task[None] | None = None
    _leaving: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._watched = [
            _Watched(served, self.models.get(served.name).engine.predictor.bundle.manifest.sha256)
            for served in self.settings.served
        ]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="moon-reload")

    def start(self) -> None:
        """Begin; called on the event loop."""
        self._task = asyncio.create_task(self._forever())

    async def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._pool.shutdown(wait=True, cancel_futures=True)
        for task in tuple(self._leaving):
            task.cancel()

    async def _forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            for watched in self._watched:
                found = await loop.run_in_executor(self._pool, _look, watched.served.bundle)
                if found is None or found.stated == watched.answers or found == watched.refused:
                    continue
                await self._change(watched, found)

    async def _change(self, watched: _Watched, found: _Found) -> None:
        served, loop = watched.served, asyncio.get_running_loop()
        watched.refused = found  # unless it serves
        try:
            model = await loop.run_in_executor(self._pool, self._prepared, served)
        except MoonError as error:
            logger.error("%s was not reloaded, the old one stays: %s", served.bundle, error)
            self.metrics.reloaded(served.name, "refused")
            return
        except Exception:
            logger.exception("%s was not reloaded, the old one stays", served.bundle)
            self.metrics.reloaded(served.name, "refused")
            return
        # What was opened may be newer than what was seen.
        watched.answers, watched.refused = model.engine.predictor.bundle.manifest.sha256, None
        before = self.models.put(model)
        self.metrics.reloaded(served.name, "swapped")
        logger.info("%s answers with version %s now", served.name, model.version)
        if before is not None:
            leaving = asyncio.create_task(self._retire(before))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    def _prepared(self, served: Served) -> Model:
        model = Model.of(
            served.name, open_served(served, self.settings), self.settings, self.metrics
        )
        model.engine.warm_up()
        return model

    async def _retire(self, model: Model) -> None:
        """Let go of a model when nobody can still ask it."""
        await asyncio.sleep(self.settings.limits.body_seconds + self.settings.limits.answer_seconds)
        await asyncio.get_running_loop().run_in_executor(None, model.close)


def _look(bundle: str) -> _Found | None:
    """What a folder holds; None where it cannot be read now."""
    root = Path(bundle)
    try:
        if (root / "manifest.json").stat().st_size > _MOST_BYTES:
            return None
        plain = json.loads((root / "manifest.json").read_bytes())
        files = sorted(
            (path.relative_to(root).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
            for path in root.rglob("*")
        )
    except (OSError, ValueError, RecursionError):
        return None  # it is being replaced, or is gone; what answers needs it no more
    stated = plain.get("sha256") if isinstance(plain, dict) else None
    return _Found(stated if isinstance(stated, str) else "none", tuple(files))
