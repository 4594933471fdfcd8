"""One pass over a set of images: what evaluation needs of each, never the images themselves.

Shape suffixes: N images, B images of one batch, L logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from moon.data.load import stream
from moon.data.source import Source
from moon.errors import UsageError
from moon.evaluation.metrics import Floats, Ints
from moon.runtime.predictor import Predictor
from moon.scores import SCORES, msp, score_function

__all__ = ["Observed", "check_scores", "observe", "sample"]


@dataclasses.dataclass(frozen=True, eq=False)
class Observed:
    """What the model said of N images.

    Attributes:
        scores: each score in float64 [N]; one that was not finite is minus infinity, since
            the gate abstains from it.
        nonfinite: how many were not finite, by score; only those with any.
        accepted: the gate's own decisions bool [N].
        predicted: most likely known class [N].
        confidence: its probability among all logits, in [0, 1], 0 where it was NaN, [N].
    """

    scores: dict[str, Floats]
    nonfinite: dict[str, int]
    accepted: NDArray[np.bool_]
    predicted: Ints
    confidence: Floats

    def __len__(self) -> int:
        return len(self.predicted)


def observe(
    predictor: Predictor,
    source: Source,
    scores: Sequence[str],
    *,
    indices: Ints,
    batch_size: int,
    tick: Callable[[int], None],
) -> Observed:
    """Run the images through the model batch by batch.

    The scores are computed here in float64 from the model's logits, so that float32 makes no
    ties; the decisions are those of the deployed graph.

    Args:
        indices: which items of the source, [N].
        tick: called with the number of images done since the last call.

    Raises:
        ImageError: an image cannot be read, naming it.
    """
    unknown_index = predictor.bundle.manifest.unknown_index
    n = len(indices)
    values = {name: np.empty(n) for name in scores}
    accepted, predicted = np.empty(n, bool), np.empty(n, np.int64)
    confidence = np.empty(n)
    done = 0
    for batch, pixels_BHWC in stream(
        source, predictor.bundle.preprocess, batch_size, indices=indices
    ):
        outputs = predictor.raw(pixels_BHWC)
        here = slice(done, done + len(batch))
        logits_BL = outputs["logits"].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            for name in scores:
                values[name][here] = score_function(name)(logits_BL, unknown_index)
            top = msp(logits_BL, unknown_index)
        accepted[here] = outputs["accept"]
        predicted[here] = outputs["label"]
        confidence[here] = np.clip(np.nan_to_num(top, nan=0.0), 0.0, 1.0)
        done += len(batch)
        tick(len(batch))
    strange = {name: int(np.sum(~np.isfinite(value))) for name, value in values.items()}
    floored = {name: np.where(np.isfinite(v), v, -np.inf) for name, v in values.items()}
    return Observed(
        floored, {k: c for k, c in strange.items() if c}, accepted, predicted, confidence
    )


def sample(source: Source, limit: int | None) -> Ints:
    """Indices of all items, or of ``limit`` of them drawn at random, always the same ones.

    Drawn rather than the first, which in a folder a class are of one class alone.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, got {limit}")
    n = len(source)
    if limit is None or limit >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, limit, replace=False))


def check_scores(scores: Sequence[str], unknown_index: int | None) -> tuple[str, ...]:
    """The names, each once, all computable for such a model.

    Raises:
        UsageError: an unknown name, a name given twice, none at all, or ``unknown`` for a
            model without an unknown class.
    """
    for name in scores:
        score_function(name)
    if not scores or len(set(scores)) != len(scores):
        raise UsageError(
            f"the scores must be one or more different names, got {', '.join(scores) or 'none'}",
            remedy=f"Choose from {', '.join(SCORES)}",
        )
    if "unknown" in scores and unknown_index is None:
        raise UsageError(
            "the score unknown needs a model with an unknown class, and this one has none",
            remedy="Choose from msp, ebo, mls",
        )
    return tuple(scores)
