"""Distance to the k-th nearest training feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moon.errors import UsageError
from moon.progress import Progress, silent
from moon.scores.fitted import Fitted, whole
from moon.scores.logits import Floats
from moon.scores.neighbours import choose, largest_products, unit_rows
from moon.scores.training import Ints, Training

__all__ = ["Knn", "fit_knn"]

K = 50


@dataclass(frozen=True, kw_only=True, eq=False)
class Knn(Fitted):
    """-||x/|x| - b_(k)||, b_(k) the k-th nearest of the bank's unit-length training features.

    Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022.
    The neighbour is found by inner products in the bank's precision, the distance to it is then
    computed from the difference in float64. Features are divided by their length, so that the
    score does not depend on it; a zero feature stays zero.

    Input: features [N, D]. Cost: O(N B D) and the bank, B D numbers.

    Attributes:
        bank: unit-length features [B, D], float64 or float32.
        k: which neighbour, int64 [].
    """

    name = "knn"
    reads: ClassVar = ("features",)
    shapes: ClassVar = {"bank": "BD", "k": ""}
    integers: ClassVar = frozenset({"k"})

    bank: NDArray[Any]
    k: Ints

    def __post_init__(self) -> None:
        super().__post_init__()
        check_neighbours("knn", int(self.k), len(self.bank))

    def _score(self, x_BD: Floats, z_BL: Floats) -> Floats:
        query = unit_rows(x_BD)
        products, where = largest_products(query, self.bank, int(self.k))
        kth = np.take_along_axis(where, products.argmin(axis=1)[:, None], axis=1)[:, 0]
        distance: Floats = np.linalg.norm(query - self.bank[kth], axis=1)
        return -distance


def fit_knn(
    training: Training,
    *,
    k: int | None = None,
    bank: str = "all",
    size: int = 1000,
    seed: int = 0,
    dtype: str = "float64",
    progress: Progress = silent,
) -> Knn:
    """A bank of training features.

    Args:
        k: None is 50 (the paper's for CIFAR-10, and OpenOOD's) for all features, and for a part
            of them the same share of it, at least 1, as the paper lowers k with its samples.
        bank: ``all`` features, a ``random`` part of them, or a ``k-center`` coreset (greedy).
        size: vectors in a bank that is a part.
        seed: of that choice.
        dtype: ``float64``, or ``float32`` for big banks: half the memory, and distances are
            right but neighbours closer to each other than 1e-7 may be taken for one another.

    Raises:
        UsageError: no features, fewer than k of them, or arguments out of range.
    """
    features = training.need("features", "knn")
    if dtype not in ("float64", "float32"):
        raise UsageError(f"a bank is float64 or float32, not {dtype}")
    unit = unit_rows(features, np.dtype(dtype))
    vectors = unit[choose(unit, bank, size, seed, progress)] if bank != "all" else unit
    if k is None:
        k = K if bank == "all" else max(1, round(K * len(vectors) / len(features)))
    check_neighbours("knn", k, len(vectors))
    return Knn(bank=vectors, k=whole(k))


def check_neighbours(score: str, k: int, vectors: int) -> None:
    if not 1 <= k <= vectors:
        raise UsageError(
            f"the score {score} with k = {k} needs at least {max(k, 1)} features in its bank, "
            f"and k of at least 1; the bank holds {vectors}",
            remedy="Give more images, or choose a smaller k",
        )
