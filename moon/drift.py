"""A test for drift of the abstain rate that may be looked at after every image.

A calibrated gate rejects in-distribution inputs at a rate that the calibration bounds. More
rejects than that, however often one looks, are evidence that inputs changed. Per image, each
of G bettors doubts the bound p0 in favour of odds that are ``tilt`` times as high, q, and
multiplies its capital by the likelihood ratio

    L = (q / p0)^x ((1 - q) / (1 - p0))^(1 - x),     x = 1 for a reject, 0 for an accept.

Its mean is at most 1 for every reject rate up to p0, whatever came before. From these, two
statistics, both a mean over bettors that bet from image j on, for every j:

    e-value     start j has the share w_j of a capital of 1 and S_t = L_t (S_t-1 + w_t); what
                has not started is kept. A nonnegative supermartingale from 1, so the chance
                that it *ever* reaches c is at most 1 / c (Ville 1939). Finding a change at
                image v costs log(1 / w_v), about log v, more than knowing where to look.
    detector    every start has a capital of 1, R_t = L_t (R_t-1 + 1): the Shiryaev-Roberts
                e-detector of Shin, Ramdas and Rinaldo, "E-detectors", NEJSDS 2023. R_t - t
                is a supermartingale, so it reaches c after c images or more on average. It
                forgets, and reacts sooner than the e-value long after the start.

The bound allows for a threshold that was found on n images: the true reject rate at the k-th
smallest of n continuous scores is Beta(k, n - k + 1), and p0 is its 1 - delta quantile. So a
gate whose calibration was unlucky beyond that, one in 1 / delta, may alarm without drift.

Both hold for images that are independent given the gate, or at least each rejected with a
chance of p0 or less given those before. One image sent again and again is not.
Betting on a bounded mean is of Waudby-Smith and Ramdas, JRSS B 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moon.binomial import beta_quantile
from moon.errors import UsageError
from moon.gate import Gate
from moon.threshold import Threshold

__all__ = ["DELTA", "DETECTOR_ALARM", "E_VALUE_ALARM", "DriftTest", "Watched"]

DELTA = 0.01
E_VALUE_ALARM = 1e3
DETECTOR_ALARM = 1e6
# How much higher than the bound the odds of a reject may be, from a little to always. Between
# two of them a bettor loses less than 2% of the best one's growth.
TILTS_G = np.geomspace(1.1, 1000.0, 24)
_CHUNK = 1024
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Watched:
    """What a test has seen, and the logarithms of what its bettors own.

    Attributes:
        images: how many.
        rejected: how many of them.
        started_G: log S of each bettor.
        recent_G: log R of each bettor.
    """

    images: int
    rejected: int
    started_G: Floats  # noqa: N815 - the shape's suffix
    recent_G: Floats  # noqa: N815

    @property
    def log_e_value(self) -> float:
        """The natural logarithm of the e-value; 0 before the first image."""
        return float(np.logaddexp(math.log(_kept(self.images)), _log_mean(self.started_G)))

    @property
    def log_detector(self) -> float:
        """The natural logarithm of the detector; -inf before the first image."""
        return float(_log_mean(self.recent_G))

    @property
    def e_value(self) -> float:
        """The evidence against the bound, since the start; inf beyond float64."""
        return _exp(self.log_e_value)

    @property
    def detector(self) -> float:
        """The evidence against the bound, lately; inf beyond float64."""
        return _exp(self.log_detector)


NOTHING = Watched(0, 0, np.full(len(TILTS_G), -np.inf), np.full(len(TILTS_G), -np.inf))


class DriftTest:
    """A test of "rejected at most as often as the calibration allows".

    Args:
        bounds: largest reject rate by the threshold that an image's score is compared with;
            one, or with thresholds by predicted class several.

    Attributes:
        bounds: as given.
    """

    def __init__(self, bounds: Mapping[float, float]) -> None:
        if not bounds or not all(0 < bound <= 1 for bound in bounds.values()):
            raise UsageError("a drift test needs bounds above 0 and up to 1")
        self.bounds = dict(sorted(bounds.items()))
        self._thresholds = np.array(list(self.bounds))
        p0_B1 = np.array(list(self.bounds.values()))[:, None]
        accept_BG = -np.log1p(p0_B1 * (TILTS_G - 1))
        # [accepted or rejected, bound, bettor]
        self._log_ratios = np.stack([accept_BG, accept_BG + np.log(TILTS_G)])

    @classmethod
    def of(cls, gate: Gate, delta: float = DELTA) -> DriftTest:
        """The test of what a gate's calibration allows.

        For the method risk, which chose its threshold with the scores, the bound is that of
        Dvoretzky, Kiefer, Wolfowitz and Massart, which holds at every threshold.

        Args:
            gate: calibrated.
            delta: the chance, over the calibration draw, that the bound is too low; with
                thresholds by class, that any of them is.

        Raises:
            UsageError: delta is out of range.
        """
        if not 0 < delta < 0.5:
            raise UsageError(f"delta must lie between 0 and 0.5, not {delta}")
        groups = (gate.overall,) if gate.per_class is None else gate.per_class.groups
        bounds: dict[float, float] = {}
        for group in groups:
            bound = _bound(group, delta / len(groups))
            bounds[group.value] = max(bound, bounds.get(group.value, 0.0))
        return cls(bounds)

    def watch(
        self, rejected_N: ArrayLike, thresholds_N: ArrayLike, before: Watched = NOTHING
    ) -> Watched:
        """What is known after N more images.

        Args:
            rejected_N: [N] booleans, in the order in which the images were decided.
            thresholds_N: [N], or one: what their scores were compared with.
            before: what was known before them.

        Raises:
            UsageError: a threshold is not one of the test's.
        """
        rejected = np.asarray(rejected_N, dtype=bool)
        which = np.broadcast_to(self._which(thresholds_N), rejected.shape)
        if len(rejected) == 1:
            return self._next(bool(rejected[0]), int(which[0]), before)
        for first in range(0, len(rejected), _CHUNK):
            part = slice(first, first + _CHUNK)
            started, recent = self._capital(rejected[part], which[part], before)
            before = _after(before, rejected[part], started, recent)
        return before

    def path(
        self, rejected_N: ArrayLike, thresholds_N: ArrayLike, before: Watched = NOTHING
    ) -> tuple[Floats, Floats]:
        """log e-value and log detector after each of N images, [N] both."""
        rejected = np.asarray(rejected_N, dtype=bool)
        which = np.broadcast_to(self._which(thresholds_N), rejected.shape)
        e_values, detectors = [np.zeros(0)], [np.zeros(0)]
        for first in range(0, len(rejected), _CHUNK):
            part = slice(first, first + _CHUNK)
            started, recent = self._capital(rejected[part], which[part], before)
            kept = np.log(_kept(before.images + 1 + np.arange(len(started))))
            e_values.append(np.logaddexp(kept, _log_mean(started)))
            detectors.append(_log_mean(recent))
            before = _after(before, rejected[part], started, recent)
        return np.concatenate(e_values), np.concatenate(detectors)

    def _which(self, thresholds_N: ArrayLike) -> NDArray[np.int64]:
        given = np.asarray(thresholds_N, dtype=np.float64)
        found = np.minimum(np.searchsorted(self._thresholds, given), len(self._thresholds) - 1)
        wrong = self._thresholds[found] != given
        if wrong.any():
            raise UsageError(
                f"{float(np.atleast_1d(given)[np.atleast_1d(wrong)][0]):g} is not a threshold "
                "of the gate that the drift test is for",
                remedy="Watch only decisions of that gate, made without --threshold",
            )
        return np.asarray(found, dtype=np.int64)

    def _next(self, rejected: bool, which: int, before: Watched) -> Watched:
        """What is known after one more image: S = L (S + w), R = L (R + 1)."""
        step_G = self._log_ratios[int(rejected), which]
        t = before.images + 1
        share = math.log(_share(np.asarray(t)))
        return Watched(
            images=t,
            rejected=before.rejected + rejected,
            started_G=step_G + np.logaddexp(before.started_G, share),
            recent_G=step_G + np.logaddexp(before.recent_G, 0.0),
        )

    def _capital(
        self, rejected_N: NDArray[np.bool_], which_N: NDArray[np.int64], before: Watched
    ) -> tuple[Floats, Floats]:
        """log S and log R after each image, [N, G] both.

        Both recursions have the solution S_t = P_t (S_0 + sum over j <= t of w_j / P_j-1),
        P the product of L; summed in logarithms.
        """
        steps_NG = self._log_ratios[rejected_N.astype(np.int64), which_N]
        product_NG = np.cumsum(steps_NG, axis=0)
        fresh_NG = steps_NG - product_NG  # -log P_j-1
        t_N = before.images + 1 + np.arange(len(rejected_N))
        share_N1 = np.log(_share(t_N))[:, None]
        found = []
        for own_G, new_NG in ((before.started_G, share_N1 + fresh_NG), (before.recent_G, fresh_NG)):
            new_NG[0] = np.logaddexp(new_NG[0], own_G)
            found.append(product_NG + np.logaddexp.accumulate(new_NG, axis=0))
        return found[0], found[1]


def _after(
    before: Watched, rejected_N: NDArray[np.bool_], started_NG: Floats, recent_NG: Floats
) -> Watched:
    return Watched(
        images=before.images + len(rejected_N),
        rejected=before.rejected + int(rejected_N.sum()),
        started_G=started_NG[-1],
        recent_G=recent_NG[-1],
    )


def _bound(threshold: Threshold, delta: float) -> float:
    n, k = threshold.n, threshold.k
    if k is not None:
        return beta_quantile(1 - delta, k, n - k + 1)
    return min(1.0, threshold.achieved["reject"] + math.sqrt(math.log(1 / delta) / (2 * n)))


def _kept(images: ArrayLike) -> Floats:
    """The share of the capital of bettors that start after so many images."""
    return np.asarray(math.log(2) / np.log(np.asarray(images, dtype=np.float64) + 2))


def _share(t: NDArray[np.int64]) -> Floats:
    """w_t, what is kept before image t less what is kept after it."""
    logs = np.log(t + 1.0)
    step = np.log1p(1 / (t + 1.0))
    return np.asarray(math.log(2) * step / (logs * (logs + step)))


def _log_mean(logs: Floats) -> Floats:
    """The logarithm of the mean over the last axis."""
    return np.asarray(np.logaddexp.reduce(logs, axis=-1) - math.log(logs.shape[-1]))


def _exp(log: float) -> float:
    return math.inf if log > 709 else math.exp(log)
