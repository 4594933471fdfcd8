from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moon.trainer.sparsity.selection import best, strongest


def chosen(scores: list[list[float]], k: int, **options: object) -> list[list[int]]:
    tensor = torch.tensor(scores)
    options.setdefault("among_GU", torch.ones(tensor.shape, dtype=torch.bool))
    found = best(tensor, k, **options)  # type: ignore[arg-type]
    return found.int().tolist()  # type: ignore[no-any-return]


def flags(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows).bool()


def test_ties_go_to_the_first() -> None:
    assert chosen([[1, 2.0, 2, 1, 2]], 2) == [[0, 1, 1, 0, 0]]
    assert chosen([[1, 2.0, 2, 1, 2]], 4) == [[1, 1, 1, 0, 1]]
    assert chosen([[0.0, 0, 0, 0], [0, 0, 0, 0]], 3, cap=2) == [[1, 1, 0, 0], [1, 0, 0, 0]]


def test_a_group_holds_its_cap_and_the_rest_goes_elsewhere() -> None:
    scores = [[9.0, 8, 7, 6], [1, 2, 3, 4]]
    assert chosen(scores, 3, cap=2) == [[1, 1, 0, 0], [0, 0, 0, 1]]
    # One of the second group is there already, so one more fits.
    taken = flags([[0, 0, 0, 0], [1, 0, 0, 0]])
    options = {"taken_GU": taken, "among_GU": ~taken, "cap": 2}
    assert chosen(scores, 3, **options) == [[1, 1, 0, 0], [0, 0, 0, 1]]
    assert chosen(scores, 4, **options) == [[1, 1, 0, 0], [0, 0, 0, 1]]  # No more fit.


def test_positions_below_zero_are_no_units() -> None:
    assert chosen([[3.0, 1, -1, -1]], 3, cap=3) == [[1, 1, 0, 0]]


def test_only_candidates_are_chosen() -> None:
    assert chosen([[5.0, 4, 3, 2]], 2, among_GU=flags([[0, 1, 0, 1]])) == [[0, 1, 0, 1]]
    assert chosen([[5.0, 4, 3, 2]], 9, among_GU=flags([[0, 1, 0, 1]])) == [[0, 1, 0, 1]]
    assert chosen([[5.0, 4, 3, 2]], 0) == [[0, 0, 0, 0]]


@pytest.mark.parametrize("cap", [None, 2])
def test_nan_and_infinity_keep_the_count(cap: int | None) -> None:
    nan, inf = float("nan"), float("inf")
    for k in (1, 2, 3):
        found = chosen([[nan, 1, inf, 0], [nan, nan, nan, 2]], k, cap=cap)
        assert sum(map(sum, found)) == k
    taken = flags([[0, 0, 1, 1]])
    options = {"taken_GU": taken, "among_GU": ~taken, "cap": 2}
    assert chosen([[inf, nan, 1, 1]], 1, **options) == [[0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    scores = torch.tensor([[1.0, 3, 2, 4]], dtype=dtype)
    assert strongest(scores, 2).int().tolist() == [[0, 1, 0, 1]]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 36), st.integers(1, 6), st.data())
def test_the_choice_is_the_optimum_under_the_cap(
    groups: int, units: int, k: int, cap: int, data: st.DataObject
) -> None:
    numbers = st.lists(st.integers(0, 5), min_size=groups * units, max_size=groups * units)
    scores = torch.tensor(data.draw(numbers), dtype=torch.float32).view(groups, units)
    found = best(scores, k, among_GU=torch.ones_like(scores, dtype=torch.bool), cap=cap)
    assert int(found.sum(1).max()) <= cap
    assert int(found.sum()) == min(k, groups * min(cap, units))
    # A greedy choice, best first, is optimal: the groups' bounds form a matroid.
    held, total = [0] * groups, 0.0
    for value, group in sorted((v, g) for g in range(groups) for v in scores[g].tolist())[::-1]:
        if sum(held) < k and held[group] < cap:
            held[group] += 1
            total += value
    assert float(scores[found].sum()) == total
