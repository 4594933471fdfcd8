"""Which plan a convolution tries next: the cost model, corrected by what was measured so far.

A family is all plans that differ in their blocks alone. What one plan of a family took says how
far the model is off for the others, and layers of the same shape learn from each other in which
order to try; what a layer keeps, only its own times decide.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from moon.runtime.sparse.costs import Costs, Weights, candidates
from moon.runtime.sparse.geometry import Geometry
from moon.runtime.sparse.plan import Plan

__all__ = ["Search"]

# Plans tried, and how much dearer than the cheapest one they may be by the model.
_MOST, _DEAREST = 40, 3.0
# A plan is tried while it is expected to be no slower than this, beside the best so far.
_HOPE = 1.5
# Families without a time are thought a little better than the model says.
_OPTIMISM = 0.9
# Brothers do not all try the same plan in one round.
_TAKEN = 1.1


class Search:
    """Plans for one convolution, and what they took.

    Args:
        geometry: of the convolution.
        weights: of it.
        costs: the model.
        default: the plan in use.

    Attributes:
        kin: equal for layers that may learn from each other.
        times: seconds of the plans tried, the least.
    """

    def __init__(self, geometry: Geometry, weights: Weights, costs: Costs, default: Plan) -> None:
        self.kin: Hashable = (
            geometry.window, replace(geometry.source, slack=0), geometry.target, weights.rows
        )  # fmt: skip
        self.default, self._columns = default, max(1, weights.columns)
        listed = candidates(geometry, weights, costs)
        self._costs = {plan: cost for cost, plan in listed}
        self._costs.setdefault(default, listed[0][0])
        near = [plan for cost, plan in listed if cost <= _DEAREST * listed[0][0]]
        self._plans = near[: 4 * _MOST]
        self._keys = {plan: self._key(plan) for plan in self._costs}
        self._families = {plan: replace(plan, block=0) for plan in self._costs}
        self.times: dict[Plan, float] = {}
        self.siblings: Sequence[Search] = ()

    @property
    def best(self) -> Plan:
        """The fastest so far."""
        return min(self.times, key=self.times.__getitem__) if self.times else self.default

    @property
    def finalists(self) -> tuple[Plan, Plan, Plan]:
        """The default, the fastest, and the fastest but one, or the fastest once more."""
        ranked = sorted(self.times, key=self.times.__getitem__)
        return self.default, self.best, ranked[1] if len(ranked) > 1 else self.best

    def note(self, plan: Plan, seconds: float) -> None:
        """What a plan took."""
        self.times[plan] = min(seconds, self.times.get(plan, seconds))

    def next(self, taken: Sequence[Plan]) -> Plan | None:
        """The plan to try, or None where none is likely to be better.

        Args:
            taken: what siblings try in the same round.
        """
        left = [plan for plan in self._plans if plan not in self.times]
        if not left or len(self.times) >= _MOST or self.default not in self.times:
            return None
        others = {self._key(plan) for plan in taken}
        expected = self._expected(left)
        for plan in left:
            if self._keys[plan] in others:
                expected[plan] *= _TAKEN
        plan = min(left, key=lambda one: (expected[one], self._costs[one], str(one)))
        hope = _HOPE * self.times[self.best] / self.times[self.default]
        return plan if expected[plan] <= hope else None

    def _key(self, plan: Plan) -> Plan:
        """The same for layers with a few more or fewer columns, where all are in one block."""
        return replace(plan, block=0) if plan.block >= self._columns else plan

    def _expected(self, plans: Sequence[Plan]) -> dict[Plan, float]:
        """What plans take, as shares of the default's time."""
        same: dict[Plan, list[float]] = {}
        # By family, shares of the default's time for a cycle of the model.
        rates: dict[Plan, float] = {}
        for search in (self, *self.siblings):
            base = search.times.get(search.default)
            if base is None:
                continue
            for tried, seconds in search.times.items():
                same.setdefault(search._keys[tried], []).append(seconds / base)
                rate, family = seconds / base / search._costs[tried], search._families[tried]
                rates[family] = min(rate, rates.get(family, rate))
        unknown = _OPTIMISM / self._costs[self.default]
        found = {}
        for plan in plans:
            if times := same.get(self._keys[plan]):
                found[plan] = sum(times) / len(times)
            else:
                found[plan] = self._costs[plan] * rates.get(self._families[plan], unknown)
        return found
