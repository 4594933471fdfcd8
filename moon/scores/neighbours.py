"""Nearest neighbours in a bank of feature vectors, exactly and in bounded memory.

Shapes: Q queries, B bank vectors, D features, N candidates for a bank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import UsageError
from moon.progress import Progress, silent
from moon.scores.training import Ints, rows

__all__ = ["choose", "greedy_k_center", "largest_products", "unit_rows"]

Array = NDArray[Any]

BANK_ROWS = 8192


def unit_rows(values_ND: Array, dtype: Any = np.float64) -> Array:
    """Rows divided by their Euclidean length; a zero row stays zero."""
    out = np.empty(values_ND.shape, dtype)
    for here in rows(len(values_ND)):
        part = values_ND[here].astype(np.float64)
        # Divided by the largest entry first, so that no square overflows or vanishes.
        peak = np.abs(part).max(axis=1, keepdims=True)
        part /= np.where(peak > 0, peak, 1.0)
        length = np.sqrt(np.einsum("nd,nd->n", part, part))[:, None]
        out[here] = part / np.where(length > 0, length, 1.0)
    return out


def largest_products(query_QD: Array, bank_BD: Array, k: int) -> tuple[Array, Ints]:
    """The ``k`` largest inner products of each query with the bank, in no order.

    The bank is read in blocks of rows, so that Q (8192 + k) products are held at a time.

    Returns:
        products [Q, k] of the bank's type, and the bank rows [Q, k] they are with.
    """
    best = np.empty((len(query_QD), 0), bank_BD.dtype)
    where = np.empty((len(query_QD), 0), np.int64)
    query_QD = query_QD.astype(bank_BD.dtype)
    for here in rows(len(bank_BD), BANK_ROWS):
        found = query_QD @ bank_BD[here].T
        top = _largest(found, k)
        best = np.concatenate([best, np.take_along_axis(found, top, axis=1)], axis=1)
        where = np.concatenate([where, top + here.start], axis=1)
        top = _largest(best, k)
        best = np.take_along_axis(best, top, axis=1)
        where = np.take_along_axis(where, top, axis=1)
    return best, where


def _largest(values_QB: Array, k: int) -> Ints:
    """Columns of the ``k`` largest of each row, or all: [Q, min(k, B)]."""
    columns = values_QB.shape[1]
    if columns <= k:
        return np.broadcast_to(np.arange(columns), values_QB.shape)
    return np.argpartition(values_QB, columns - k, axis=1)[:, columns - k :]


def choose(unit_ND: Array, how: str, size: int, seed: int, progress: Progress = silent) -> Ints:
    """Rows for a bank: ``all``, ``random`` (without replacement) or ``k-center``, sorted.

    Raises:
        UsageError: no such way, or a size that is not from 1 to N.
    """
    count = len(unit_ND)
    if how == "all":
        return np.arange(count)
    if how not in ("random", "k-center"):
        raise UsageError(f"a bank is all, random or k-center, not {how}")
    if not 1 <= size <= count:
        raise UsageError(
            f"a bank of {size} vectors cannot be chosen from {count}",
            remedy=f"Choose a size from 1 to {count}",
        )
    if how == "random":
        return np.sort(np.random.default_rng(seed).choice(count, size, replace=False))
    return np.sort(greedy_k_center(unit_ND, size, seed, progress))


def greedy_k_center(unit_ND: Array, size: int, seed: int = 0, progress: Progress = silent) -> Ints:
    """``size`` different rows that cover all rows, each the farthest from those before it.

    Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985: the largest
    distance to the nearest chosen row is at most twice the least that any choice reaches.
    The first row is drawn by ``seed``. Cost: O(N D size), memory O(N).

    Args:
        unit_ND: rows of length 1 (or 0), as by :func:`unit_rows`.

    Returns:
        int64 [size] in the order of choice.
    """
    squares_N = np.einsum("nd,nd->n", unit_ND, unit_ND)
    nearest_N = np.full(len(unit_ND), np.inf)
    chosen = np.empty(size, np.int64)
    row = int(np.random.default_rng(seed).integers(len(unit_ND)))
    for step in range(size):
        chosen[step] = row
        distance_N = squares_N + squares_N[row] - 2 * (unit_ND @ unit_ND[row])
        np.minimum(nearest_N, distance_N, out=nearest_N)
        nearest_N[row] = -np.inf  # never again, not even among equal rows
        row = int(nearest_N.argmax())
        progress(step + 1, size, "choosing the bank")
    return chosen
