"""Which plans are tried, by made-up times."""

from __future__ import annotations

from moon.runtime.sparse.costs import Costs, Weights, candidates
from moon.runtime.sparse.geometry import Geometry, Window
from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.plan import Plan
from moon.runtime.sparse.search import Search

GEOMETRY = Geometry(
    Planes(64, 1, 16, 16), Window((3, 3), pads=(1, 1, 1, 1)), Planes(64, 1, 16, 16)
)  # fmt: skip
WEIGHTS = Weights(rows=64, columns=576, pairs=192, nonzeros=3600, shared=3000)
COSTS = Costs()


def search() -> Search:
    return Search(GEOMETRY, WEIGHTS, COSTS, candidates(GEOMETRY, WEIGHTS, COSTS)[0][1])


def explored(one: Search, seconds: dict[str, float]) -> list[Plan]:
    """All plans tried, where a reading takes so many times what the model says."""
    costs = {plan: cost for cost, plan in candidates(GEOMETRY, WEIGHTS, COSTS)}
    one.note(one.default, costs[one.default] * seconds.get(one.default.reading, 1.0))
    tried = [one.default]
    while (plan := one.next([])) is not None:
        one.note(plan, costs[plan] * seconds.get(plan.reading, 1.0))
        tried.append(plan)
    return tried


def test_nothing_is_tried_before_the_default_has_a_time() -> None:
    assert search().next([]) is None and search().best == search().default


def test_it_ends_and_tries_nothing_twice() -> None:
    tried = explored(search(), {})
    assert 5 < len(tried) <= 40 and len(set(tried)) == len(tried)


def test_a_reading_that_the_model_thinks_too_dear_is_found() -> None:
    one = search()
    other = next(
        plan.reading
        for _, plan in candidates(GEOMETRY, WEIGHTS, COSTS)
        if plan.reading != one.default.reading
    )
    tried = explored(one, {other: 0.3})
    assert one.best.reading == other
    # And once it is found, the rest of its family comes first.
    first = next(i for i, plan in enumerate(tried) if plan.reading == other)
    assert sum(plan.reading == other for plan in tried[first : first + 8]) >= 6


def test_the_least_time_counts() -> None:
    one = search()
    one.note(one.default, 2.0)
    one.note(one.default, 3.0)
    assert one.times[one.default] == 2.0


def test_siblings_tell_each_other_in_which_order() -> None:
    one, other = search(), search()
    one.siblings, other.siblings = [other], [one]
    assert one.kin == other.kin
    one.note(one.default, 1.0)
    other.note(other.default, 1.0)
    first = one.next([])
    assert first is not None and other.next([first]) != first
    # What was slow for one is not tried by the other; what was fast is the next.
    one.note(first, 5.0)
    assert other.next([]) != first
    fast = other.next([])
    assert fast is not None
    one.note(fast, 0.1)
    assert other.next([]) == fast and other.best == other.default
