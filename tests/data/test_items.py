from __future__ import annotations

import numpy as np
import pytest

from moon.data.items import Source, checked_labels, shown
from moon.errors import DataError


def make(count: int = 5) -> Source:
    return Source(
        spec="list",
        items=[bytes([i]) for i in range(count)],
        labels=np.arange(count),
        class_names=tuple("abcdefgh"[:count]),
        fields={"twice": np.arange(count) * 2},
    )


def test_a_source_is_numbered_and_named() -> None:
    source = make()
    assert len(source) == 5
    assert source.item(3) == b"\x03"
    assert source.name(3) == "list[3]"
    for wrong in (-1, 5):
        with pytest.raises(IndexError):
            source.item(wrong)


def test_selections_compose_and_keep_names() -> None:
    source = make().select([4, 2, 0]).select([2, 0])
    assert [source.item(i) for i in range(len(source))] == [b"\x00", b"\x04"]
    assert [source.name(i) for i in range(2)] == ["list[0]", "list[4]"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 4]
    assert source.fields["twice"].tolist() == [0, 8]
    assert len(make().select([])) == 0


def test_labels_are_checked() -> None:
    assert checked_labels(np.array([[1], [0]], np.uint8), 2, None, "x").tolist() == [1, 0]
    assert checked_labels([-1.0, 2.0], 2, ("a", "b", "c"), "x").dtype == np.int64
    for labels, names, message in (
        ([0, 1, 2], None, r"2 images but labels of shape \[3\]"),
        ([[0, 1], [1, 0]], None, r"labels of shape \[2, 2\]"),
        ([0.5, 1], None, "not whole numbers but float64"),
        (["a", "b"], None, "not whole numbers"),
        ([True, False], None, "not whole numbers but bool"),
        ([0, float("nan")], None, "not whole numbers"),
        ([0, -2], None, "item 1 of x has the label -2, but that is no class"),
        ([0, 2], ("a", "b"), "item 1 of x has the label 2, but there are 2 classes"),
        (np.array([0, 2**63], np.uint64), None, "item 1"),
    ):
        with pytest.raises(DataError, match=message):
            checked_labels(labels, 2, names, "x")


def test_long_lists_are_cut() -> None:
    assert shown([]) == "none"
    assert shown(["a", "b"]) == "a, b"
    assert shown([str(i) for i in range(15)], 3) == "0, 1, 2 and 12 more"
