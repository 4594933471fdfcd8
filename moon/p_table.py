"""p-values of every carried score, as two tables that a graph holds.

The marginal conformal p-value of a score s is (1 + #{calibration scores <= s}) / (n + 1). A
graph looks it up: row r of ``scores`` holds calibration scores of carried score r, ascending
and filled up with +inf, and p is ``levels[r, #{scores[r] <= s}]``. With more distinct
calibration scores than fit, some are left out, and between two that are kept p is that just
below the upper one. So a p-value from a thinned table is never smaller than the exact one, and
rejecting at p <= a keeps the promise for every a, as :meth:`moon.gate.Gate.p_value` does. It is
exact for the lowest scores, where p-values are read; elsewhere it is too large by less than
2.5% of itself for any n to a million. Levels are rounded down to float32.

Scores that are not finite count as the lowest, as for the threshold. NaN reaches no entry and
has the level of such a score. Before calibration all scores are +inf and all levels NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moon.threshold import as_float32

__all__ = ["DENSE", "WIDTH", "PTable", "p_row"]

WIDTH = 1024
# So many of the lowest distinct scores are always kept.
DENSE = 512

Float32s = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class PTable:
    """The two tables, S carried scores in graph order.

    Attributes:
        scores: float32 [S, 1024].
        levels: float32 [S, 1025].
    """

    scores: Float32s
    levels: Float32s

    @classmethod
    def blank(cls, rows: int) -> PTable:
        """Those of a graph that is not calibrated."""
        return cls(
            np.full((rows, WIDTH), np.inf, np.float32),
            np.full((rows, WIDTH + 1), np.nan, np.float32),
        )

    @classmethod
    def of(cls, scores_SN: Sequence[ArrayLike], ranks: Sequence[int | None]) -> PTable:
        """From calibration scores of each carried score.

        Args:
            scores_SN: of each carried score, [n].
            ranks: of each, the rank of a threshold among them that must be kept, or None.
        """
        rows = [p_row(scores, k) for scores, k in zip(scores_SN, ranks, strict=True)]
        return cls(np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows]))

    @property
    def is_blank(self) -> bool:
        """Nothing is calibrated."""
        return bool(np.isposinf(self.scores).all() and np.isnan(self.levels).all())

    def p_values(self, row: int, scores_N: ArrayLike) -> Float32s:
        """What a graph gives for scores of one row, [N]."""
        values = as_float32(scores_N)
        counts = np.searchsorted(self.scores[row], values, side="right")
        found: Float32s = self.levels[row][np.where(np.isnan(values), 0, counts)]
        return found

    def fault(self) -> str | None:
        """What is wrong with its numbers, None for a table that is blank or well made."""
        if self.is_blank:
            return None
        if np.isnan(self.scores).any() or np.isneginf(self.scores).any():
            return "p_scores holds NaN or -inf"
        if not (self.scores[:, 1:] >= self.scores[:, :-1]).all():
            return "p_scores is not ascending"
        if not ((self.levels > 0) & (self.levels <= 1)).all():
            return "p_levels holds what is no p-value"
        if not (np.diff(self.levels, axis=1) >= 0).all():
            return "p_levels falls"
        return None


def p_row(scores_N: ArrayLike, k: int | None = None) -> tuple[Float32s, Float32s]:
    """One row of the tables.

    With at most 1,024 distinct finite scores p is exact, but for rounding down to float32.
    Else the lowest 512 are kept, the largest, that of rank ``k``, and between them as many as
    fit, their distance growing with the rank, so that p is off by a small share of itself.

    Args:
        scores_N: [n] calibration scores, n >= 1.
        k: a rank, 1 for the smallest, whose score must be kept; at a threshold of that rank
            p then says on which side of it a score is, exactly.

    Returns:
        float32 [1024] and float32 [1025].
    """
    values = as_float32(scores_N).reshape(-1)
    n = len(values)
    finite = np.sort(values[np.isfinite(values)])
    nonfinite = n - len(finite)
    distinct, last = np.unique(finite, return_counts=True)
    ranks = nonfinite + np.cumsum(last)
    below = np.concatenate([[nonfinite], ranks[:-1]])[: len(ranks)]
    if len(distinct) > WIDTH:
        must = None if k is None else int(np.searchsorted(ranks, k))
        kept = _kept(ranks, must)
        distinct, below = distinct[kept], below[kept]
    scores = np.full(WIDTH, np.inf, np.float32)
    scores[: len(distinct)] = distinct
    counts = np.full(WIDTH + 1, n)
    counts[: len(distinct)] = below
    return scores, _down((1 + counts) / (n + 1))


def _kept(ranks: NDArray[np.int64], must: int | None) -> NDArray[np.int64]:
    """Positions, 1,024 of more distinct scores of these ``ranks``: see :func:`p_row`."""
    room = WIDTH - DENSE - (must is not None)
    # Even steps of the logarithm of the rank. Each is taken by the first score that reaches it,
    # so between two that are kept fewer than a step is lost, however many scores are tied.
    steps = np.geomspace(ranks[DENSE - 1], ranks[-1], room)
    steps[-1] = ranks[-1]  # whatever rounding made of it
    spread = np.searchsorted(ranks, steps)
    kept = np.union1d(np.arange(DENSE), spread if must is None else np.append(spread, must))
    # Some steps met in one score: the lowest scores that are left take their places.
    left = np.setdiff1d(np.arange(len(ranks)), kept, assume_unique=True)
    return np.union1d(kept, left[: WIDTH - len(kept)])


def _down(exact: NDArray[np.float64]) -> Float32s:
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(0)), near).astype(np.float32)
