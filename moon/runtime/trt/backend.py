"""The backends ``tensorrt`` and ``tensorrt_rtx``: a bundle's engine, run on an NVIDIA GPU."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError
from moon.runtime.ending import UNDER_WAY
from moon.runtime.trt.device import Device
from moon.runtime.trt.engine import Engine
from moon.runtime.trt.lane import Lane, Timings
from moon.runtime.trt.outcome import Outcome
from moon.runtime.trt.pool import Pool

__all__ = ["CONTEXTS", "Settings", "TensorRT"]

# Each has its own memory for activations and buffers; more than a few keep no GPU busier.
CONTEXTS = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an engine is run.

    Attributes:
        graphs: capture CUDA graphs: batches of a size that comes again cost one launch.
        sleeping: sleep while the GPU computes, and leave the core to others.
        contexts: most batches under way at once; each has memory of its own on the GPU.
    """

    graphs: bool = True
    sleeping: bool = False
    contexts: int = CONTEXTS

    def __post_init__(self) -> None:
        if self.contexts < 1:
            raise BackendError(f"there must be 1 or more contexts, not {self.contexts}")


class TensorRT:
    """An engine and the gate of its bundle. Safe for several threads.

    Args:
        name: ``tensorrt`` or ``tensorrt_rtx``.
        device: the GPU; let go of when this is closed.
        engine: loaded on it.
        outcome: makes the bundle's outputs of the engine's.
        values: of the engine's inputs that are no images, by name.
        dtype: of the images, as the bundle's graph takes them.
        settings: how to run it.
        facts: what :meth:`info` says beside name and settings: ``version`` and so on.

    Raises:
        BackendError: no execution context can be made.
    """

    def __init__(
        self,
        *,
        name: str,
        device: Device,
        engine: Engine,
        outcome: Outcome,
        values: Mapping[str, NDArray[Any]],
        dtype: str,
        settings: Settings,
        facts: Mapping[str, Any],
    ) -> None:
        self.name = name
        self.outputs: tuple[str, ...] = outcome.outputs
        self._device, self._engine, self._outcome = device, engine, outcome
        self._dtype, self._settings, self._facts = np.dtype(dtype), settings, dict(facts)
        self._process, self._closed = os.getpid(), False
        self._seen: set[int] = set()
        ports = engine.ports
        wanted = [one.name for one in ports.outputs if one.name in outcome.wanted]
        self._shapes = {one.name: one.row for one in ports.outputs if one.name in wanted}

        def lane() -> Lane:
            return Lane(
                device, engine.execution(), ports, values, wanted,
                graphs=settings.graphs and not engine.graphs_by_itself, sleeping=settings.sleeping,
            )  # fmt: skip

        self._pool = Pool(lane, settings.contexts)
        _OPEN.add(self)
        with self._pool.lane(0):
            pass  # the first is made now, so that what is wrong is found when a model is opened

    def run(self, batch: NDArray[Any], threshold: float | None = None) -> dict[str, NDArray[Any]]:
        """See :class:`moon.runtime.backend.Backend`; any number of images."""
        self._check(batch)
        return self._outcome.of(self._found(batch, Lane.run), threshold)

    def timed(
        self, batch: NDArray[Any], threshold: float | None = None
    ) -> tuple[dict[str, NDArray[Any]], Timings]:
        """See :class:`moon.runtime.timed.Timed`; of a batch in pieces, the sum of them."""
        self._check(batch)
        spent = [Timings(0.0, 0.0, 0.0)]

        def clocked(lane: Lane, rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
            found, timings = lane.timed(rows)
            spent[0] += timings
            return found

        return self._outcome.of(self._found(batch, clocked), threshold), spent[0]

    def info(self) -> dict[str, Any]:
        """Beside what every backend says the GPU, the engine, and how it is run."""
        profile = self._engine.ports.profile
        kept = self._engine.kept
        return {
            "name": self.name,
            **self._facts,
            "threads": 1,
            "profile": {"min": profile.least, "opt": profile.best, "max": profile.most},
            "cuda_graph": self._settings.graphs,
            "contexts": {"most": self._settings.contexts, "made": self._pool.count},
            "compiled_before": None if kept is None else kept.found,
        }

    def close(self) -> None:
        """Free the GPU, once; batches under way are waited for, later ones refused."""
        if self._closed or os.getpid() != self._process:
            return  # in a process that was forked it is the parent's
        _OPEN.discard(self)
        self._pool.close()
        if self._pool.count == 0:
            self._closed = True
            self._engine.close()
            self._device.close()

    def __del__(self) -> None:
        if hasattr(self, "_pool"):
            self.close()

    def _found(
        self,
        batch: NDArray[Any],
        run: Callable[[Lane, NDArray[Any]], dict[str, NDArray[Any]]],
    ) -> dict[str, NDArray[Any]]:
        """The engine's wanted outputs for all rows, whatever its profile."""
        if not len(batch):
            return {name: np.empty((0, *row), np.float32) for name, row in self._shapes.items()}
        pieces = self._engine.ports.profile.pieces(len(batch))
        with UNDER_WAY, self._pool.lane(pieces[0].stop) as lane:
            parts = [run(lane, batch[piece]) for piece in pieces]
        self._keep({piece.stop - piece.start for piece in pieces})
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _keep(self, sizes: set[int]) -> None:
        """Save what was compiled when sizes were run for the first time."""
        if self._engine.kept is not None and not sizes <= self._seen:
            self._seen |= sizes
            with UNDER_WAY:
                self._engine.save()

    def _check(self, batch: NDArray[Any]) -> None:
        if os.getpid() != self._process:
            raise BackendError(
                "a GPU cannot be used in a process that was forked after it was opened",
                remedy="Open the model in the process that runs it, or start that one by spawn",
            )
        row = self._engine.ports.image.row
        if batch.ndim != len(row) + 1 or batch.shape[1:] != row or batch.dtype != self._dtype:
            raise BackendError(
                f"the model takes {self._dtype} [N, {', '.join(map(str, row))}], "
                f"not {batch.dtype} {list(batch.shape)}"
            )


_OPEN: weakref.WeakSet[TensorRT] = weakref.WeakSet()


def _end() -> None:
    """As the interpreter ends: nobody comes in any more, and what is open is closed in order."""
    UNDER_WAY.end()
    for backend in list(_OPEN):
        backend.close()


atexit.register(_end)
