"""One pass over a set of images: what evaluation needs of each, never the images themselves.

No more than a few batches of images are in memory, whatever a set's size; of each image some
tens of bytes are kept. Shape suffixes: N images, B images of one batch, L logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle
from moon.data.fingerprint import pixel_fingerprint
from moon.data.load import stream
from moon.data.source import Source
from moon.errors import UsageError
from moon.evaluation.corruptions import reencoded
from moon.evaluation.metrics import Floats, Ints
from moon.runtime.predictor import Predictor
from moon.scores import SCORE_TABLE, ebo, gen, mls, msp, unknown

__all__ = ["FROM_LOGITS", "Observed", "check_scores", "observe", "sample"]

# Scores that any model's logits give; the others need what only a bundle that carries them has.
FROM_LOGITS: Mapping[str, Callable[[Any, int | None], Floats]] = {
    "msp": msp,
    "ebo": ebo,
    "mls": mls,
    "unknown": unknown,
    "gen": gen,
}
# Of these an exported graph may carry a variant with constants of its own, which then counts.
_TUNED = frozenset({"gen"})
Pixels = NDArray[np.uint8]


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
        pixels: 64 bits of BLAKE2b of each image's pixels, before any re-encoding, [N]; empty
            if not kept.
        grey: whether an image in colour has the same value in all channels, [N]; empty if not
            kept.
    """

    scores: dict[str, Floats]
    nonfinite: dict[str, int]
    accepted: NDArray[np.bool_]
    predicted: Ints
    confidence: Floats
    pixels: NDArray[np.uint64] = dataclasses.field(default_factory=lambda: np.empty(0, np.uint64))
    grey: NDArray[np.bool_] = dataclasses.field(default_factory=lambda: np.empty(0, bool))

    def __len__(self) -> int:
        return len(self.predicted)

    @classmethod
    def joined(cls, parts: Sequence[Observed]) -> Observed:
        """One after the other; all have the same scores."""
        if len(parts) == 1:
            return parts[0]
        strange = dict.fromkeys(name for part in parts for name in part.nonfinite)
        return cls(
            {name: np.concatenate([p.scores[name] for p in parts]) for name in parts[0].scores},
            {name: sum(part.nonfinite.get(name, 0) for part in parts) for name in strange},
            np.concatenate([part.accepted for part in parts]),
            np.concatenate([part.predicted for part in parts]),
            np.concatenate([part.confidence for part in parts]),
            np.concatenate([part.pixels for part in parts]),
            np.concatenate([part.grey for part in parts]),
        )


def observe(
    predictor: Predictor,
    source: Source,
    scores: Sequence[str],
    *,
    indices: Ints,
    batch_size: int,
    tick: Callable[[int], None],
    jpeg: int | None = None,
) -> Observed:
    """Run the images through the model batch by batch.

    A score of logits is computed here in float64, so that float32 makes no ties; any other is
    the graph's own output. The decisions are those of the deployed graph.

    Args:
        indices: which items of the source, [N].
        tick: called with the number of images done since the last call.
        jpeg: re-encode every image at this JPEG quality first, at the model's size.

    Raises:
        ImageError: an image cannot be read, naming it.
    """
    seen = _Seen(predictor, scores, len(indices))
    for batch, pixels_BHWC in stream(
        source, predictor.bundle.preprocess, batch_size, indices=indices
    ):
        hashes = [pixel_fingerprint(pixels) for pixels in pixels_BHWC]
        if jpeg is not None:
            pixels_BHWC = np.stack([reencoded(pixels, jpeg) for pixels in pixels_BHWC])
        seen.add(pixels_BHWC, hashes)
        tick(len(batch))
    return seen.observed()


class _Seen:
    """Fills the arrays of an ``Observed`` from batches of prepared images."""

    def __init__(self, predictor: Predictor, scores: Sequence[str], n: int) -> None:
        self._predictor = predictor
        self._values = {name: np.empty(n) for name in scores}
        self._accepted, self._predicted = np.empty(n, bool), np.empty(n, np.int64)
        self._confidence, self._pixels = np.empty(n), np.empty(n, np.uint64)
        self._grey = np.zeros(n, bool)
        self._done = 0

    def add(self, pixels_BHWC: Pixels, hashes_B: Sequence[int]) -> None:
        outputs = self._predictor.raw(pixels_BHWC)
        here = slice(self._done, self._done + len(pixels_BHWC))
        unknown_index = self._predictor.bundle.manifest.unknown_index
        logits_BL = outputs["logits"].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            for name, values in self._values.items():
                own = f"score_{name}" in outputs and (name in _TUNED or name not in FROM_LOGITS)
                values[here] = (
                    outputs[f"score_{name}"] if own else FROM_LOGITS[name](logits_BL, unknown_index)
                )
            top = msp(logits_BL, unknown_index)
        self._accepted[here] = outputs["accept"]
        self._predicted[here] = outputs["label"]
        self._confidence[here] = np.clip(np.nan_to_num(top, nan=0.0), 0.0, 1.0)
        self._pixels[here] = hashes_B
        if pixels_BHWC.shape[-1] > 1:
            same = pixels_BHWC[..., 1:] == pixels_BHWC[..., :1]
            self._grey[here] = same.all(axis=(1, 2, 3))
        self._done += len(pixels_BHWC)

    def observed(self) -> Observed:
        strange = {name: int(np.sum(~np.isfinite(v))) for name, v in self._values.items()}
        return Observed(
            {name: np.where(np.isfinite(v), v, -np.inf) for name, v in self._values.items()},
            {name: count for name, count in strange.items() if count},
            self._accepted,
            self._predicted,
            self._confidence,
            self._pixels,
            self._grey,
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


def check_scores(scores: Sequence[str], bundle: Bundle) -> tuple[str, ...]:
    """The names, each once, all to be had of such a bundle; default those it carries.

    Raises:
        UsageError: a name that the bundle neither carries nor can be had from logits, a name
            given twice, or ``unknown`` for a model without an unknown class.
    """
    carried = bundle.manifest.scores
    names = tuple(scores) or carried
    if len(set(names)) != len(names):
        raise UsageError(
            f"the scores must be one or more different names, got {', '.join(names)}",
            remedy=f"Choose from {', '.join(carried)}",
        )
    if "unknown" in names and bundle.manifest.unknown_index is None:
        raise UsageError(
            "the score unknown needs a model with an unknown class, and this one has none",
            remedy=f"Choose from {', '.join(carried)}",
        )
    strange = [name for name in names if name not in carried and name not in FROM_LOGITS]
    if strange:
        raise _not_carried(strange[0], bundle)
    return names


def _not_carried(name: str, bundle: Bundle) -> UsageError:
    """Why a score cannot be had of a bundle, and what can."""
    carried = bundle.manifest.scores
    cause = f"{bundle.path} does not carry the score {name}; it carries {', '.join(carried)}"
    if name == "odin":
        return UsageError(
            "the score odin needs the gradient of the model by its input, which no bundle has",
            remedy="Take moon.evaluation.odin on the PyTorch model, or choose another score",
        )
    if name not in SCORE_TABLE:
        known = [score for score in SCORE_TABLE if score == name.lower()]
        every = ", ".join(dict.fromkeys([*carried, *SCORE_TABLE]))
        said = f"Perhaps {known[0]} is meant" if known else f"There are {every}"
        return UsageError(
            f"{bundle.path} does not carry the score {name}: none is called so", remedy=said
        )
    spec = SCORE_TABLE[name]
    needs = " and ".join(
        [
            *(["the model's features"] if "features" in spec.reads else []),
            *(["constants of its training images"] if spec.fits else []),
        ]
    )
    return UsageError(
        cause, remedy=f"It needs {needs}: export the model with it, or choose one carried"
    )
