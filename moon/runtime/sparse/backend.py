"""The sparse CPU engine as a backend of bundles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon import __version__
from moon.errors import BackendError, UsageError
from moon.runtime.sparse.engine import SparseEngine
from moon.runtime.sparse.tuning import Tuning

__all__ = ["SparseBackend"]


class SparseBackend:
    """A graph that follows the bundle's conventions, its zeros left out.

    Args:
        model: the ONNX file.
        threads: threads for one inference; 0 for as many cores as this process may use.
        spin: let idle threads spin between runs, where ONNX Runtime runs the whole model.
        precision: what the graph computes in, for :meth:`info`.
        warn: told, in a line, of what may make it slower than expected.
        tuning: what was measured of this model on this CPU.

    Raises:
        BackendError: the model is damaged, or not like a bundle's.
        MissingExtraError: llvmlite is not installed.
    """

    name = "sparse"

    def __init__(
        self,
        model: bytes,
        *,
        threads: int = 1,
        spin: bool = False,
        precision: str = "fp32",
        warn: Callable[[str], None],
        tuning: Tuning | None = None,
    ) -> None:
        self._engine = engine = SparseEngine(
            model, threads=threads, spin=spin, warn=warn, tuning=tuning
        )
        self._precision = precision
        self._tuned = [] if tuning is None else sorted(tuning.batches)
        self.outputs = engine.outputs
        images = [one for one in engine.inputs if one.name != "threshold"]
        if len(images) != 1 or not images[0].is_image:
            raise BackendError(
                "the graph must have one image input, float32 or uint8 of four dimensions",
                remedy="Export the model with moon export",
            )
        self._input = images[0]
        given = {*engine.optional, *(one.name for one in engine.inputs)}
        self._takes_threshold = "threshold" in given

    def run(self, batch: NDArray[Any], threshold: float | None = None) -> dict[str, NDArray[Any]]:
        """See :class:`moon.runtime.backend.Backend`.

        Raises:
            BackendError: also where the batch holds NaN or infinity.
        """
        feeds: dict[str, NDArray[Any]] = {self._input.name: batch}
        if threshold is not None:
            if not self._takes_threshold:
                raise BackendError("the graph's threshold is not an input, so it is fixed")
            feeds["threshold"] = np.array(threshold, dtype=np.float32)
        try:
            return self._engine.run_all(feeds)
        except UsageError as error:
            raise BackendError(error.cause, remedy=error.remedy) from error

    def info(self) -> dict[str, Any]:
        """Beside what every backend says the instruction set, what is handed over, and layers.

        ``sparse_layers`` are the convolutions and linear layers that the engine could run
        (``eligible``) and does (``picked``); both 0 where ONNX Runtime runs the whole model.
        ``tuned_batches`` are the numbers of images for which stored plans are used.
        """
        isa, (picked, eligible) = self._engine.isa, self._engine.layers
        return {
            "name": self.name,
            "version": __version__,
            "provider": f"moon, {isa}" if isa else "ONNX Runtime, CPU",
            "precision": self._precision,
            "threads": self._engine.threads,
            "isa": isa or None,
            "handed_over": self._engine.handed_over or None,
            "sparse_layers": {"eligible": eligible, "picked": picked},
            "tuned_batches": self._tuned,
        }
