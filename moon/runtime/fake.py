"""A backend that makes up its outputs from the mean brightness of each image.

It needs no model and no ONNX Runtime, and is deterministic: for tests of what stands around
a backend, and for measuring that alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError
from moon.scores import SCORES, known_logits
from moon.threshold import accepts, as_float32

if TYPE_CHECKING:
    from moon.bundle import Bundle

__all__ = ["FakeBackend"]


class FakeBackend:
    """Logits that are a fixed function of each image's mean, and the outputs that follow.

    Args:
        logits: number of logits.
        unknown_index: column of the unknown class, or None.
        scores: names of the scores to return.
        gate_score: which of them is ``score``.
        threshold: of the gate, or [K] one for each known class.
    """

    name = "fake"

    def __init__(
        self,
        *,
        logits: int,
        unknown_index: int | None,
        scores: tuple[str, ...],
        gate_score: str,
        threshold: float | NDArray[np.float32],
    ) -> None:
        self._logits, self._unknown = logits, unknown_index
        self._scores, self._gate_score = scores, gate_score
        known = logits - (unknown_index is not None)
        self._bars_K = np.broadcast_to(as_float32(threshold), known)
        carried = tuple(f"score_{name}" for name in scores)
        self.outputs: tuple[str, ...] = ("label", "accept", "score", "logits", *carried)

    @classmethod
    def of(cls, bundle: Bundle) -> FakeBackend:
        """One with the outputs of ``bundle``'s graph.

        Raises:
            BackendError: the graph carries a score that logits alone do not give.
        """
        for name in bundle.manifest.scores:
            if name not in SCORES:
                raise BackendError(
                    f"the fake backend has no {name}, which the bundle carries",
                    remedy=f"Use a bundle that carries only some of {', '.join(SCORES)}",
                )
        gate = bundle.gate("fake")
        return cls(
            logits=bundle.manifest.logits,
            unknown_index=bundle.manifest.unknown_index,
            scores=bundle.manifest.scores,
            gate_score=bundle.gate_score,
            threshold=np.inf if gate is None else gate.bars(np.arange(len(bundle.classes))),
        )

    def run(self, batch: NDArray[Any], threshold: float | None = None) -> dict[str, NDArray[Any]]:
        """See :class:`moon.runtime.backend.Backend`."""
        if batch.ndim != 4:
            raise BackendError(f"the model takes four dimensions, not {list(batch.shape)}")
        mean_N = batch.reshape(len(batch), -1).astype(np.float64).mean(axis=1)
        phase_NL = mean_N[:, None] + np.arange(self._logits)
        logits_NL = (5 * np.sin(3 * phase_NL)).astype(np.float32)
        found = {
            f"score_{name}": as_float32(SCORES[name](logits_NL, self._unknown))
            for name in self._scores
        }
        score_N = found[f"score_{self._gate_score}"]
        label_N = known_logits(logits_NL, self._unknown).argmax(axis=1)
        bar = self._bars_K[label_N] if threshold is None else np.float32(threshold)
        return {
            "label": label_N,
            "accept": accepts(score_N, bar),
            "score": score_N,
            "logits": logits_NL,
            **found,
        }

    def info(self) -> dict[str, Any]:
        """Name, version, provider, precision and threads."""
        return {
            "name": self.name,
            "version": "1",
            "provider": "none",
            "precision": "fp32",
            "threads": 1,
        }
