"""A threshold and the calibration scores behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moon.errors import BundleError
from moon.fields import Fields

__all__ = ["STORED_SCORES", "Achieved", "Threshold", "as_float32"]

STORED_SCORES = 10_000

Bad = Callable[[str], BundleError]


class _AchievedRisk(TypedDict, total=False):
    error: float
    error_bound: float


class Achieved(_AchievedRisk):
    """What a threshold does on the calibration scores.

    Attributes:
        reject: share of the calibration scores rejected.
        ci95: central 95% interval of the true reject rate of in-distribution inputs.
        error: share of the accepted that were classified wrongly (method risk only).
        error_bound: upper confidence bound of that error, at 1 - delta (method risk only).
    """

    reject: float
    ci95: list[float]


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """One threshold found among one group's calibration scores.

    Attributes:
        value: accept when score >= value; always a float32 value.
        n: calibration scores in all.
        k: rank of the value among them, 1 for the smallest; None when it is not one of them.
        nonfinite: how many of the n were NaN or infinite; they hold the lowest ranks.
        achieved: what the value does on the calibration scores.
        scores: finite calibration scores, sorted; thinned where there are many.
        ranks: rank, from 1, of each of ``scores`` among all n; rank k is never thinned away.
    """

    value: float
    n: int
    k: int | None
    nonfinite: int
    achieved: Achieved
    scores: tuple[float, ...]
    ranks: tuple[int, ...]

    def check(self, bad: Bad) -> None:
        """Refuse what contradicts itself.

        Raises:
            BundleError: made by ``bad`` from its cause.
        """
        if not math.isfinite(self.value) or float(as_float32(self.value)) != self.value:
            raise bad(f"the threshold {self.value} is not a finite float32")
        if self.n < 1 or not 0 <= self.nonfinite < self.n:
            raise bad(f"n = {self.n} and nonfinite = {self.nonfinite} contradict each other")
        scores, ranks = np.asarray(self.scores), np.asarray(self.ranks)
        if not 1 <= len(scores) == len(ranks) <= STORED_SCORES:
            raise bad("scores and ranks must have one length, from 1 to 10,000")
        if not np.isfinite(scores).all() or (np.diff(scores) < 0).any():
            raise bad("the calibration scores must be finite and sorted")
        if (np.diff(ranks) < 1).any() or ranks[0] != self.nonfinite + 1 or ranks[-1] != self.n:
            raise bad("the ranks must grow from the first finite score's to n")

    def check_rank(self, bad: Bad) -> None:
        """Refuse a value that is not the score of rank k."""
        at = np.flatnonzero(np.asarray(self.ranks) == self.k)
        if len(at) != 1 or self.scores[at[0]] != self.value:
            raise bad(f"the threshold is not the calibration score of rank {self.k}")

    def p_value(self, score: float) -> float | None:
        """(1 + #{calibration scores <= score}) / (n + 1), or None for a score not finite.

        Between two stored scores of a thinned set the larger count is taken, which keeps it
        a valid p-value.
        """
        value = as_float32(score)
        if not np.isfinite(value):
            return None
        below = int(np.searchsorted(self._sorted, value, side="right"))
        next_rank = self.ranks[below] if below < len(self.ranks) else self.n + 1
        return next_rank / (self.n + 1)

    @cached_property
    def _sorted(self) -> NDArray[np.float32]:
        return np.asarray(self.scores, dtype=np.float32)

    def to_json(self, *, stored: bool = True) -> dict[str, Any]:
        """The object in gate.json; ``stored`` False leaves the stored scores out."""
        plain: dict[str, Any] = {
            "threshold": self.value,
            "n": self.n,
            "k": self.k,
            "nonfinite": self.nonfinite,
            "achieved": dict(self.achieved),
        }
        if stored:
            plain |= {"scores": list(self.scores), "ranks": list(self.ranks)}
        return plain

    @classmethod
    def take(cls, fields: Fields, bad: Bad) -> Threshold:
        """Read one out of ``fields``, to be checked.

        Raises:
            BundleError: a field is missing or of the wrong type.
        """
        return cls(
            value=fields.number("threshold"),
            n=fields.integer("n"),
            k=fields.maybe_integer("k"),
            nonfinite=fields.integer("nonfinite"),
            achieved=_achieved(fields.mapping("achieved"), bad),
            scores=fields.numbers("scores"),
            ranks=fields.integers("ranks"),
        )


def as_float32(values: ArrayLike) -> NDArray[np.float32]:
    """Scores as backends compute them; a value beyond float32 becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(values).astype(np.float32)


def accepts(scores_N: ArrayLike, bars_N: ArrayLike) -> NDArray[np.bool_]:
    """Which scores are accepted: finite and >= the threshold, compared as float32.

    Args:
        scores_N: [N] scores.
        bars_N: the threshold, or [N] one for each score.
    """
    values, bars = as_float32(scores_N), as_float32(bars_N)
    with np.errstate(invalid="ignore"):
        accepted: NDArray[np.bool_] = np.isfinite(values) & (values >= bars)
    return accepted


def stored_ranks(first: int, n: int, k: int | None, limit: int) -> Sequence[int]:
    """The ranks ``first`` .. ``n``, thinned evenly to ``limit``; the ends and k always stay."""
    if n - first + 1 <= limit:
        return range(first, n + 1)
    even = np.linspace(first, n, limit - 1).round().astype(np.int64)
    kept: list[int] = np.unique(even if k is None else np.append(even, k)).tolist()
    return kept


def _achieved(plain: dict[str, Any], bad: Bad) -> Achieved:
    fields = Fields(plain, "achieved", bad)
    ci95 = fields.numbers("ci95")
    if len(ci95) != 2:
        raise bad("achieved.ci95 must hold two numbers")
    achieved: Achieved = {"reject": fields.number("reject"), "ci95": list(ci95)}
    error, error_bound = fields.maybe_number("error"), fields.maybe_number("error_bound")
    fields.done()
    if error is not None and error_bound is not None:
        achieved["error"], achieved["error_bound"] = error, error_bound
    return achieved
