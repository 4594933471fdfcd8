"""How accuracy and abstention move as the known images get worse: corrupted, yet valid, inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.data.load import stream
from moon.evaluation.corruptions import CORRUPTIONS, STRENGTHS, constant, corrupt, reencoded
from moon.evaluation.metrics import Ints, rate_ci
from moon.evaluation.sets import EvalSet
from moon.runtime.predictor import Predictor

__all__ = ["RUNS", "corruption_figures", "corruption_sample"]

Pixels = NDArray[np.uint8]
# How often each chosen image is run: as it is, and in every corruption.
RUNS = 1 + len(CORRUPTIONS) * len(STRENGTHS)


def corruption_sample(known: EvalSet, most: int) -> Ints:
    """Positions within the set of at most so many images, drawn at random, always the same."""
    n = len(known)
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(1).choice(n, most, replace=False))


def corruption_figures(
    predictor: Predictor,
    known: EvalSet,
    labels: Ints | None,
    positions: Ints,
    *,
    gated: bool,
    batch_size: int,
    tick: Callable[[int], None],
    jpeg: int | None = None,
) -> dict[str, Any] | None:
    """Accuracy and abstain rate on the same known images, clean and corrupted.

    Args:
        labels: of all images of ``known``, or None.
        positions: which images of ``known`` to use.
        gated: whether the decisions mean anything; without a gate they are None.
        tick: called with the number of images run since the last call.

    Returns:
        ``n``, ``clean`` and ``kinds``: a list a kind of five entries, each with ``strength``,
        ``amount`` (the definition's constant), ``accuracy``, ``abstain``, ``accuracy_accepted``
        and ``wrong_accepted``, the share of all images that is accepted with a wrong label.
    """
    if len(positions) == 0:
        return None
    chosen = None if labels is None else labels[positions]
    tally: dict[tuple[str, int], _Tally] = {}
    done = 0
    for batch, pixels_BHWC in stream(
        known.source, predictor.bundle.preprocess, batch_size, indices=known.indices[positions]
    ):
        if jpeg is not None:
            pixels_BHWC = np.stack([reencoded(pixels, jpeg) for pixels in pixels_BHWC])
        here = slice(done, done + len(batch))
        for kind, strength, worse_BHWC in _all(pixels_BHWC, done):
            outputs = predictor.raw(worse_BHWC)
            counted = tally.setdefault((kind, strength), _Tally())
            counted.add(outputs, None if chosen is None else chosen[here])
            tick(len(batch))
        done += len(batch)
    side = min(predictor.bundle.preprocess.crop)
    return {
        "n": len(positions),
        "of": len(known),
        "clean": tally["", 0].figures(gated),
        "kinds": {kind: list(_by_strength(kind, tally, gated, side)) for kind in CORRUPTIONS},
    }


def _all(pixels_BHWC: Pixels, first: int) -> Iterator[tuple[str, int, Pixels]]:
    yield "", 0, pixels_BHWC
    for kind in CORRUPTIONS:
        for strength in STRENGTHS:
            yield kind, strength, corrupt(pixels_BHWC, kind, strength, first=first)


def _by_strength(
    kind: str, tally: dict[tuple[str, int], _Tally], gated: bool, side: int
) -> Iterable[dict[str, Any]]:
    for strength in STRENGTHS:
        amount = constant(kind, strength, side)
        yield {
            "strength": strength,
            "amount": round(amount) if kind == "jpeg" else round(amount, 4),
            **tally[kind, strength].figures(gated),
        }


class _Tally:
    """Counts of one corruption at one strength."""

    def __init__(self) -> None:
        self._n = self._accepted = 0
        self._labelled = self._right = self._judged = self._right_accepted = 0

    def add(self, outputs: dict[str, NDArray[Any]], labels: Ints | None) -> None:
        accepted = outputs["accept"].astype(bool)
        self._n += len(accepted)
        self._accepted += int(accepted.sum())
        if labels is None:
            return
        has = labels >= 0
        right = has & (outputs["label"] == labels)
        self._labelled += int(has.sum())
        self._right += int(right.sum())
        self._judged += int((accepted & has).sum())
        self._right_accepted += int((accepted & right).sum())

    def figures(self, gated: bool) -> dict[str, Any]:
        abstained = self._n - self._accepted
        wrong = self._judged - self._right_accepted
        return {
            "accuracy": _share(self._right, self._labelled),
            "abstain": abstained / self._n if gated else None,
            "abstain_ci95": list(rate_ci(abstained, self._n)) if gated else None,
            "accuracy_accepted": _share(self._right_accepted, self._judged) if gated else None,
            "wrong_accepted": _share(wrong, self._labelled) if gated else None,
        }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
