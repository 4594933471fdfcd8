"""Energy, guided by the nearest neighbours among training features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moon.errors import UsageError
from moon.scores.fitted import Fitted, whole
from moon.scores.knn import check_neighbours
from moon.scores.logits import Floats, logsumexp
from moon.scores.neighbours import choose, largest_products, unit_rows
from moon.scores.training import Ints, Training, rows

__all__ = ["NNGuide", "fit_nnguide"]

LEAST = 500


@dataclass(frozen=True, kw_only=True, eq=False)
class NNGuide(Fitted):
    """E(x) * mean of the k largest E(b) <x/|x|, b/|b|> over the bank's b.

    Park, Jung and Teoh, "Nearest Neighbor Guidance for Out-of-Distribution Detection", ICCV 2023.
    E is the energy, logsumexp of the known logits.

    Input: features [N, D] and logits [N, L]. Cost: O(N B D) and the bank, B D numbers.

    Attributes:
        bank: unit-length features times their energy, [B, D], float64 or float32.
        k: how many neighbours, int64 [].
        known: logits of the known classes, int64 [K].
        outputs: L, int64 [].
    """

    name = "nnguide"
    reads: ClassVar = ("features", "logits")
    shapes: ClassVar = {"bank": "BD", "k": "", "known": "K", "outputs": ""}
    integers: ClassVar = frozenset({"k", "known", "outputs"})

    bank: NDArray[Any]
    k: Ints
    known: Ints
    outputs: Ints

    def __post_init__(self) -> None:
        super().__post_init__()
        check_neighbours("nnguide", int(self.k), len(self.bank))

    def _score(self, x_BD: Floats, z_BL: Floats) -> Floats:
        products, _ = largest_products(unit_rows(x_BD), self.bank, int(self.k))
        energy = logsumexp(z_BL[:, self.known])
        guided: Floats = energy * products.mean(axis=1, dtype=np.float64)
        return guided


def fit_nnguide(
    training: Training,
    *,
    k: int = 100,
    alpha: float = 0.01,
    seed: int = 0,
    dtype: str = "float64",
) -> NNGuide:
    """A random part of the training features, each times its energy.

    Args:
        k: neighbours; 100 as OpenOOD v1.5 (the authors' code: 10).
        alpha: share of the training features in the bank, as the paper's and OpenOOD's 1%; but
            at least 500 of them (1% of CIFAR-10), or all where there are fewer.
        seed: of that choice.
        dtype: ``float64``, or ``float32`` for big banks.

    Raises:
        UsageError: no features or logits, fewer than k of them, or arguments out of range.
    """
    features = training.need("features", "nnguide")
    logits, known = training.need("logits", "nnguide"), training.known
    if not 0 < alpha <= 1:
        raise UsageError(f"alpha is the bank's share of the features, above 0 to 1, not {alpha}")
    if dtype not in ("float64", "float32"):
        raise UsageError(f"a bank is float64 or float32, not {dtype}")
    size = min(len(features), max(LEAST, math.ceil(alpha * len(features))))
    check_neighbours("nnguide", k, size)
    chosen = choose(features, "random", size, seed)
    bank = unit_rows(features[chosen], np.dtype(dtype))
    for here in rows(size):
        z = logits[chosen[here]][:, known].astype(np.float64)
        bank[here] *= logsumexp(z)[:, None].astype(bank.dtype)
    return NNGuide(bank=bank, k=whole(k), known=known, outputs=whole(training.outputs))
