"""Which of several scores separates two kinds of images best, and which are as good.

AUROC is a mean over images of either side of how many of the other side they beat, so how much
one score's mean over sets of AUROCs exceeds another's is a sum over images too. Its variance is
that of DeLong, DeLong and Clarke-Pearson ("Comparing the Areas under Two or More Correlated
Receiver Operating Characteristic Curves", Biometrics 44, 1988), carried over from one pair of
sets to a weighted mean over several that share the in-distribution images. An image made from
an in-distribution one counts with it as one draw.

Shape suffixes: N in-distribution images, M images of a set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Compared", "Standing", "auroc", "compare_scores"]

_Z = 1.959963984540054

Floats = NDArray[np.float64]
Scores = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Compared:
    """One set of out-of-distribution images.

    Attributes:
        scores: by name, [M].
        weight: of its AUROC in the mean; 0 leaves it out.
        rows: which in-distribution image each was made from, [M]; None for images of their own.
    """

    scores: Scores
    weight: float
    rows: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Standing:
    """A score's mean AUROC, and how far it is behind the best, with a 95% interval."""

    name: str
    auroc: float
    ci95: tuple[float, float]
    behind: float
    behind_ci95: tuple[float, float]


def auroc(id_N: NDArray[np.float32], ood_M: NDArray[np.float32]) -> float:
    """P(ID score > OOD score) + P(equal) / 2."""
    return float(_wins(id_N, ood_M).mean())


def compare_scores(names: Sequence[str], known: Scores, sets: Sequence[Compared]) -> list[Standing]:
    """The scores from the best down, by their weighted mean AUROC over the sets.

    Args:
        names: the scores.
        known: in-distribution scores by name, [N], finite.
        sets: one or more with weights above 0 that sum to 1.
    """
    parts = {name: _Sum.of(known[name], [one.scores[name] for one in sets], sets) for name in names}
    order = sorted(names, key=lambda name: -parts[name].value)
    best = parts[order[0]]
    found = []
    for name in order:
        own = parts[name]
        behind, error = best.value - own.value, best.error(own)
        alone = own.error(None)
        found.append(
            Standing(
                name,
                own.value,
                (max(0.0, own.value - _Z * alone), min(1.0, own.value + _Z * alone)),
                behind,
                (behind - _Z * error, behind + _Z * error),
            )
        )
    return found


@dataclass(frozen=True, eq=False)
class _Sum:
    """A mean AUROC, and what each independent draw adds to it, beside its mean.

    ``draws`` holds one array for the in-distribution images and one for each set with images
    of its own.
    """

    value: float
    draws: tuple[Floats, ...]

    @classmethod
    def of(
        cls,
        id_N: NDArray[np.float32],
        ood: Sequence[NDArray[np.float32]],
        sets: Sequence[Compared],
    ) -> _Sum:
        n, value = len(id_N), 0.0
        shared_N, own = np.zeros(n), []
        for one, ood_M in zip(sets, ood, strict=True):
            if not one.weight:
                continue
            wins_N, losses_M = _wins(id_N, ood_M), 1 - _wins(ood_M, id_N)
            area = float(wins_N.mean())
            value += one.weight * area
            shared_N += one.weight * (wins_N - area) / n
            apart_M = one.weight * (losses_M - area) / len(ood_M)
            if one.rows is None:
                own.append(apart_M)
            else:
                np.add.at(shared_N, one.rows, apart_M)
        return cls(value, (shared_N, *own))

    def error(self, other: _Sum | None) -> float:
        """Standard error of the value, or of the difference to another on the same images."""
        total = 0.0
        for i, draws in enumerate(self.draws):
            apart = draws if other is None else draws - other.draws[i]
            total += float(np.sum(apart**2)) * len(apart) / max(len(apart) - 1, 1)
        return math.sqrt(total)


def _wins(one_N: NDArray[np.float32], other_M: NDArray[np.float32]) -> Floats:
    """What share of the others each is above, ties counting half, [N]."""
    ranked = np.sort(other_M)
    below = np.searchsorted(ranked, one_N, side="left")
    upto = np.searchsorted(ranked, one_N, side="right")
    wins: Floats = (below + upto) / (2 * len(ranked))
    return wins
