from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.evaluation import metrics
from moon.runtime.rank import Compared, auroc, compare_scores

few = st.lists(st.integers(-5, 5), min_size=1, max_size=30)


@given(few, few)
def test_auroc_is_the_metrics(known: list[int], unknown: list[int]) -> None:
    one, other = np.float32(known), np.float32(unknown)
    assert auroc(one, other) == pytest.approx(metrics.auroc(one, other), abs=1e-12)


def draw(rng: np.random.Generator, n: int, m: int, gaps: dict[str, float]) -> tuple:
    """Scores that share most of their noise, ``gaps`` apart from the unknown ones."""
    shared, apart = rng.standard_normal(n), rng.standard_normal(m)
    known = {
        name: (shared + gap + 0.5 * rng.standard_normal(n)).astype(np.float32)
        for name, gap in gaps.items()
    }
    unknown = {name: (apart + 0.5 * rng.standard_normal(m)).astype(np.float32) for name in gaps}
    return known, unknown


def test_the_mean_is_weighted_and_a_weight_of_nothing_leaves_a_set_out() -> None:
    known = {"a": np.float32([1, 2, 3])}
    sets = [
        Compared({"a": np.float32([0])}, 0.25),
        Compared({"a": np.float32([2, 4])}, 0.75),
        Compared({"a": np.float32([9])}, 0.0),
    ]
    (found,) = compare_scores(["a"], known, sets)
    assert found.auroc == pytest.approx(0.25 * 1 + 0.75 * 0.25)
    assert (found.behind, found.behind_ci95) == (0, (0, 0))


def test_best_first_and_a_score_is_never_behind_its_copy() -> None:
    known, unknown = draw(np.random.default_rng(0), 400, 300, {"good": 2.0, "bad": 0.5})
    known["copy"], unknown["copy"] = known["good"], unknown["good"]
    found = compare_scores(["bad", "good", "copy"], known, [Compared(unknown, 1.0)])
    assert [one.name for one in found] == ["good", "copy", "bad"]
    assert found[1].behind_ci95 == (0, 0)
    assert 0 < found[2].behind_ci95[0] < found[2].behind < found[2].behind_ci95[1]
    assert found[0].ci95[0] < found[0].auroc < found[0].ci95[1]


def test_the_error_of_a_difference_by_hand() -> None:
    """Two known images and one made of each: alone they are 4 draws, in pairs 2 larger ones."""
    known = {"a": np.float32([0, 2]), "b": np.float32([7, 7])}
    scores = {"a": np.float32([1, -1]), "b": np.float32([7, 7])}
    for rows, error in ((None, 0.125**0.5), (np.array([0, 1]), 0.5), (np.array([1, 0]), 0.0)):
        first, second = compare_scores(["b", "a"], known, [Compared(scores, 1.0, rows)])
        assert (first.name, first.auroc, second.auroc) == ("a", 0.75, 0.5)
        half = 1.959963984540054 * error
        assert second.behind_ci95 == pytest.approx((0.25 - half, 0.25 + half))


def coverage(made: bool, gaps: tuple[float, float]) -> tuple[float, float]:
    """How often the 95% interval of a difference holds the true one, and its mean width."""
    rng = np.random.default_rng(7)
    names = dict(zip("ab", gaps, strict=True))

    def one(n: int, m: int) -> tuple[dict, list[Compared]]:
        known, unknown = draw(rng, n, m, names)
        rows = None
        if made:  # an image made from another scores alike
            rows = rng.permutation(n)[:m]
            unknown = {x: (unknown[x] + known[x][rows] - names[x]).astype(np.float32) for x in "ab"}
        return known, [Compared(unknown, 0.5, rows), Compared(draw(rng, 2, m, names)[1], 0.5)]

    def area(known: dict, sets: list[Compared], name: str) -> float:
        return sum(0.5 * auroc(known[name], each.scores[name]) for each in sets)

    known, sets = one(60_000, 60_000)
    truth = area(known, sets, "a") - area(known, sets, "b")
    hits, width = 0, 0.0
    for _ in range(400):
        found = {each.name: each for each in compare_scores(["a", "b"], *one(150, 120))}
        best = max(found.values(), key=lambda each: each.auroc)
        sign = 1 if best.name == "a" else -1
        low, high = found["b" if best.name == "a" else "a"].behind_ci95
        hits += low <= sign * truth <= high
        width += (high - low) / 400
    return hits / 400, width


@pytest.mark.parametrize("made", [False, True])
def test_the_interval_of_a_difference_covers_it(made: bool) -> None:
    covered, width = coverage(made, (1.4, 1.2))
    assert 0.92 <= covered <= 0.98
    assert width < 0.2
