"""When the topology is updated, and how much of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

from moon.errors import UsageError

__all__ = ["UpdateSchedule"]


@dataclass(frozen=True, kw_only=True)
class UpdateSchedule:
    """A topology update every ``interval`` optimizer steps until a last step.

    The drop fraction falls by the cosine alpha / 2 * (1 + cos(pi * t / T_end))
    (Evci et al. 2020, RigL, equation 1). Pruning leaves the share (1 - t / T_end)^3 of the
    surplus (Zhu and Gupta 2017, equation 1).

    Attributes:
        interval: optimizer steps between two updates (dT).
        drop_fraction: share of a layer's connections replaced at the first update (alpha).
        stop: share of ``total_steps`` after which the topology stands still.
        total_steps: optimizer steps of the whole run; None keeps the drop fraction
            constant and never stops.
        cosine_steps: steps after which the drop fraction has fallen to zero; None for T_end.

    Raises:
        UsageError: a value out of range.
    """

    interval: int = 100
    drop_fraction: float = 0.3
    stop: float = 0.7
    total_steps: int | None = None
    cosine_steps: int | None = None

    def __post_init__(self) -> None:
        _whole("interval", self.interval, "100 steps suit a batch of 128")
        for name in ("total_steps", "cosine_steps"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), "Give the number of optimizer steps")
        for name in ("drop_fraction", "stop"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0.0 <= float(value) <= 1.0:
                what = f"{name} is a share within 0..1, not {value!r}"
                raise UsageError(what, remedy="The paper has drop_fraction 0.3 and stop 0.7")

    @property
    def end(self) -> float:
        """T_end: updates happen at steps before it; infinite without ``total_steps``."""
        if self.total_steps is None:
            return math.inf
        return math.floor(self.stop * self.total_steps)

    def due(self, step: int) -> bool:
        """Whether the topology is updated when ``step`` optimizer steps have been taken."""
        return step > 0 and step % self.interval == 0 and step < self.end

    def fraction(self, step: int) -> float:
        """Share of a layer's connections to replace after ``step`` optimizer steps."""
        end = self.end if self.cosine_steps is None else self.cosine_steps
        if step >= min(end, self.end):
            return 0.0
        if end == math.inf:
            return self.drop_fraction
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * step / end))

    def surplus(self, step: int) -> float:
        """Share of the connections to prune that is left after ``step`` optimizer steps."""
        if step >= self.end:
            return 0.0
        return float((1 - step / self.end) ** 3)


def _whole(name: str, value: object, remedy: str) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name} is a whole number of at least 1, not {value!r}", remedy=remedy)
