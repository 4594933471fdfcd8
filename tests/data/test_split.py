from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.data.split import split_validation
from moon.errors import DataError, UsageError


def test_largest_remainders() -> None:
    # 5, 3 and 2 items, half of them: exact shares 2.5, 1.5 and 1; the tie goes to class 0.
    labels = np.repeat([0, 1, 2], [5, 3, 2])
    train, val = split_validation(labels, 0.5, seed=1)
    assert np.bincount(labels[val]).tolist() == [3, 1, 1]
    assert np.bincount(labels[train]).tolist() == [2, 2, 1]


def test_every_class_keeps_an_item() -> None:
    labels = np.array([0] * 10 + [1, 2])
    train, val = split_validation(labels, 9, seed=0)
    assert sorted(set(labels[train].tolist())) == [0, 1, 2]
    assert len(val) == 9


@given(
    labels=st.lists(st.integers(-1, 4), min_size=2, max_size=60),
    val=st.floats(0.01, 0.99) | st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_it_is_a_stratified_partition_of_the_right_size(
    labels: list[int], val: float, seed: int
) -> None:
    values = np.array(labels)
    count = val if val >= 1 else round(val * len(labels))
    room = len(labels) - len(set(labels))
    if not 1 <= count <= room:
        with pytest.raises(DataError, match="must keep an item to train on"):
            split_validation(values, val, seed)
        return
    train, held_out = split_validation(values, val, seed)
    assert len(held_out) == count
    assert sorted([*train, *held_out]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()
    again = split_validation(values, val, seed)
    assert np.array_equal(again[1], held_out)
    sizes = {c: labels.count(c) for c in set(labels)}
    exact = {c: count * size / len(labels) for c, size in sizes.items()}
    capped = any(share > sizes[c] - 1 for c, share in exact.items())
    for c, size in sizes.items():
        taken = int((values[held_out] == c).sum())
        assert taken <= size - 1
        assert capped or abs(taken - exact[c]) < 1


def test_seeds_differ() -> None:
    labels = np.zeros(1000, int)
    assert not np.array_equal(
        split_validation(labels, 0.5, 1)[1], split_validation(labels, 0.5, 2)[1]
    )


@pytest.mark.parametrize("val", [0, -1, 1.5, float("nan"), float("inf")])
def test_other_parts_are_refused(val: float) -> None:
    with pytest.raises(UsageError, match="a share between 0 and 1 or a number of items"):
        split_validation([0, 0, 0], val, 0)


def test_what_cannot_be_set_aside() -> None:
    with pytest.raises(DataError, match=r"cannot set 3 of 3 .*Set aside between 1 and 2"):
        split_validation([0, 0, 0], 3, 0)
    with pytest.raises(DataError, match="Use more images"):
        split_validation([0, 1], 1, 0)
    with pytest.raises(DataError, match="cannot set 0 of 3"):
        split_validation([0, 0, 0], 0.01, 0)
