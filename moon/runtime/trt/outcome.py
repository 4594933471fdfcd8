"""Decisions from what an engine computes, by the gate that the bundle has now.

An engine outlives the gate it was built with: calibrating again changes gate.json and a few
initializers of model.onnx, never an engine. So of the engine only logits, label and the carried
scores are taken. Which of these is the gate's, whether it is accepted and what its p-value is
follow here, by the same rules and in the same arithmetic as the graph's own, from the bundle as
it was opened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moon.calibrated import calibrated_values
from moon.errors import BackendError
from moon.p_table import PTable
from moon.scores import known_logits
from moon.threshold import accepts, as_float32

if TYPE_CHECKING:
    from moon.bundle import Bundle

__all__ = ["Outcome"]


class Outcome:
    """Turns an engine's outputs into those of a bundle's graph.

    Args:
        bundle: whose gate decides.
        backend: whose own gate is taken, where the bundle has one.
        engine: names of the engine's outputs.
        title: of the engine, for messages.

    Attributes:
        wanted: outputs of the engine that are needed.
        outputs: names of what :meth:`of` gives, in the graph's order.

    Raises:
        BackendError: the engine lacks an output.
    """

    def __init__(self, bundle: Bundle, backend: str, engine: Sequence[str], title: str) -> None:
        manifest = bundle.manifest
        self.outputs = manifest.outputs
        self._scores, self._score = manifest.scores, bundle.gate_score
        self._unknown = manifest.unknown_index
        self._gate = bundle.gate(backend)
        made_here = {"accept", "score", *(f"p_{name}" for name in self._scores)}
        self.wanted = tuple(name for name in self.outputs if name not in made_here)
        # The label follows from the logits; one that the engine has need not be made again.
        missing = [name for name in self.wanted if name not in engine and name != "label"]
        if missing:
            raise BackendError(
                f"{title} lacks the output {missing[0]}, which the bundle's graph has",
                remedy="Build the engine again, from this bundle",
            )
        self._p_values = None
        if any(name.startswith("p_") for name in self.outputs):
            values = calibrated_values(bundle.model_bytes())
            self._p_values = PTable(values["p_scores"], values["p_levels"])

    def of(
        self, found: dict[str, NDArray[Any]], threshold: float | None = None
    ) -> dict[str, NDArray[Any]]:
        """Every output of the graph.

        Args:
            found: :attr:`wanted` outputs of the engine, [N, ...] each.
            threshold: replaces the gate's; NaN, as for the graph, does not.
        """
        results: dict[str, NDArray[Any]] = {
            name: value.astype(np.int64 if name == "label" else np.float32, copy=False)
            for name, value in found.items()
        }
        if "label" not in results:
            results["label"] = known_logits(results["logits"], self._unknown).argmax(axis=1)
        results["score"] = results[f"score_{self._score}"].copy()
        if threshold is None or math.isnan(threshold):
            bars = self._bars(results["label"])
        else:
            bars = as_float32(threshold)
        results["accept"] = accepts(results["score"], bars)
        if self._p_values is not None:
            for row, name in enumerate(self._scores):
                results[f"p_{name}"] = self._p_values.p_values(row, results[f"score_{name}"])
        return {name: results[name] for name in self.outputs}

    def _bars(self, labels_N: NDArray[np.int64]) -> NDArray[np.float32]:
        if self._gate is None:  # not calibrated: nothing is accepted
            return as_float32(np.inf)
        return self._gate.bars(labels_N)
