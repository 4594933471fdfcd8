"""Maximum softmax probability at a fitted temperature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moon.errors import CalibrationError, UsageError
from moon.scores.fitted import Fitted, real, whole
from moon.scores.logits import Floats, softmax
from moon.scores.training import Ints, Training, rows

__all__ = ["Temperature", "fit_temperature", "rising_root"]

# The bracket doubles from 1 to at most FARTHEST; then bisection alone needs 1,100 steps at most.
STEPS = 1200
TOLERANCE = 1e-13
FARTHEST = 2.0**1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Temperature(Fitted):
    """max over the known c of softmax(z / T)_c, the softmax over all L logits.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017: T minimises
    the negative log-likelihood of held-out labels. As in msp, the unknown class is one of the
    softmax's and is not renormalised away; T is fitted to that same softmax.

    Input: logits [N, L]. Cost: one softmax, O(N L).

    Attributes:
        temperature: T > 0, [].
        known: logits of the known classes, int64 [K].
        outputs: L, int64 [].
    """

    name = "temperature"
    reads: ClassVar = ("logits",)
    shapes: ClassVar = {"temperature": "", "known": "K", "outputs": ""}

    temperature: Floats
    known: Ints
    outputs: Ints

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise UsageError(f"the temperature must be a positive number, not {self.temperature}")

    def _score(self, x_BD: Floats, z_BL: Floats) -> Floats:
        # Shifted before the division, which a small T could make infinite.
        shifted = (z_BL - z_BL.max(axis=1, keepdims=True)) / self.temperature
        best: Floats = softmax(shifted)[:, self.known].max(axis=1)
        return best


def fit_temperature(training: Training) -> Temperature:
    """The T that minimises the negative log-likelihood of held-out images.

    In s = 1 / T the likelihood is convex; its derivative, the mean of E_p[z] - z_y, is brought
    to zero by Newton steps kept within a bracket.

    Raises:
        UsageError: no logits or labels.
        CalibrationError: no temperature is best, because all images are answered rightly, or
            the logits do not favour the right classes.
    """
    logits = training.need("logits", "temperature")
    labels = training.known[training.need("labels", "temperature")]
    even, wrong = 0.0, False
    for here in rows(len(logits)):
        z = logits[here].astype(np.float64)
        right = z[np.arange(len(z)), labels[here]]
        even += float((z.mean(axis=1) - right).sum())
        wrong |= bool((right < z.max(axis=1)).any())
    if not wrong:
        raise CalibrationError(
            f"all {len(logits)} images are answered rightly, so that no temperature is best",
            remedy="Give more held-out images, or choose the score msp",
        )
    if even >= 0:
        raise CalibrationError(
            "the logits do not favour the right classes, so that no temperature is best",
            remedy="Check the order of the labels, or choose the score msp",
        )

    def slope(scale: float) -> tuple[float, float]:
        first = second = 0.0
        for here in rows(len(logits)):
            z = logits[here].astype(np.float64)
            z -= z.max(axis=1, keepdims=True)
            p = softmax(scale * z)
            mean = (p * z).sum(axis=1)
            first += float((mean - z[np.arange(len(z)), labels[here]]).sum())
            second += float((p * (z - mean[:, None]) ** 2).sum())
        return first / len(logits), second / len(logits)

    return Temperature(
        temperature=real(1 / rising_root(slope)),
        known=training.known,
        outputs=whole(training.outputs),
    )


def rising_root(slope: Callable[[float], tuple[float, float]]) -> float:
    """The s > 0 where the rising first value of ``slope(s)`` is 0; the second is its derivative.

    Newton steps kept within a bracket that starts at 1.
    """
    low = high = 1.0
    while slope(high)[0] < 0 and high < FARTHEST:
        high *= 2
    while slope(low)[0] > 0 and low > 1 / FARTHEST:
        low /= 2
    scale = math.sqrt(low) * math.sqrt(high)
    for _ in range(STEPS):
        first, second = slope(scale)
        low, high = (scale, high) if first < 0 else (low, scale)
        newton = scale - first / second if second > 0 else math.inf
        new = newton if low < newton < high else (low + high) / 2
        if abs(new - scale) <= TOLERANCE * scale:
            return new
        scale = new
    return scale
