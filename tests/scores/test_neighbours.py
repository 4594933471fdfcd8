from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.errors import UsageError
from moon.scores import Training, fit_score, neighbours
from moon.scores.neighbours import choose, greedy_k_center, largest_products, unit_rows
from tests.scores.samples import draw, strange


def test_unit_rows_by_hand() -> None:
    found = unit_rows(np.array([[3.0, -4.0], [0.0, 0.0], [1e200, 0.0], [1e-200, 1e-200]]))
    half = np.sqrt(0.5)
    assert found == pytest.approx(np.array([[0.6, -0.8], [0, 0], [1, 0], [half, half]]))
    assert unit_rows(np.ones((1, 4)), np.float32).dtype == np.float32


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_the_largest_products_are_those_of_sorting(bank: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Few different values, so that there are ties.
    q, b = rng.integers(-2, 3, (5, 2)).astype(float), rng.integers(-2, 3, (bank, 2)).astype(float)
    k = min(k, bank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "BANK_ROWS", 4)
        values, where = largest_products(q, b, k)
    products = q @ b.T
    assert np.array_equal(np.sort(values, axis=1), np.sort(products, axis=1)[:, bank - k :])
    assert np.array_equal(np.take_along_axis(products, where, axis=1), values)
    assert all(len(set(row)) == k for row in where.tolist())


def test_memory_is_bounded_by_blocks() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60_000, 8)).astype(np.float32)
    score = fit_score("knn", Training(features=features), dtype="float32")
    tracemalloc.start()
    score.score(features[:2000])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All products at once would be 2000 x 60,000 x 4 bytes = 480 MB.
    assert peak < 120e6


def test_k_center_by_hand() -> None:
    points = np.array([[0.0], [1.0], [10.0], [11.0], [4.0]])
    first = int(np.random.default_rng(0).integers(5))
    chosen = greedy_k_center(points, 5, seed=0).tolist()
    assert chosen[0] == first and sorted(chosen) == [0, 1, 2, 3, 4]
    for step in range(1, 5):
        gap = {p: min(abs(points[p, 0] - points[c, 0]) for c in chosen[:step]) for p in range(5)}
        assert gap[chosen[step]] == max(gap.values())


def test_k_center_takes_different_rows_even_among_equal_ones() -> None:
    assert sorted(greedy_k_center(np.ones((4, 2)), 4).tolist()) == [0, 1, 2, 3]


def test_k_center_covers_better_than_chance_and_tells_its_progress() -> None:
    unit = unit_rows(np.concatenate([draw(400)[0], strange(4)]))
    told: list[tuple[int, int]] = []
    center = choose(unit, "k-center", 12, 0, lambda done, total, what: told.append((done, total)))
    chance = choose(unit, "random", 12, 0)

    def cover(chosen: np.ndarray) -> float:
        gaps = np.linalg.norm(unit[:, None] - unit[chosen][None], axis=2).min(axis=1)
        return float(gaps.max())

    assert cover(center) < cover(chance)
    assert told[-1] == (12, 12) and len(told) == 12
    for chosen in (center, chance):
        assert len(set(chosen.tolist())) == 12 and (np.diff(chosen) > 0).all()


def test_choices_are_repeated_by_their_seed() -> None:
    unit = unit_rows(draw(100)[0])
    for how in ("random", "k-center"):
        assert choose(unit, how, 9, 3).tolist() == choose(unit, how, 9, 3).tolist()
        assert choose(unit, how, 9, 3).tolist() != choose(unit, how, 9, 4).tolist()
    assert choose(unit, "all", 9, 0).tolist() == list(range(100))


def test_wrong_choices_are_named() -> None:
    unit = np.ones((5, 2))
    with pytest.raises(UsageError, match=r"all, random or k-center, not best"):
        choose(unit, "best", 2, 0)
    for size in (0, 6):
        with pytest.raises(UsageError, match=f"bank of {size} vectors .* from 5. Choose a size"):
            choose(unit, "random", size, 0)
