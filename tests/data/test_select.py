from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.data.items import Source
from moon.data.select import select
from moon.data.spec import parse
from moon.errors import DataError, UsageError

LABELS = np.array([0, 1, 2, 3, 0, 1, 2, 3, -1, 3])


def make(*, named: bool = True, labelled: bool = True) -> Source:
    return Source(
        spec="set",
        items=[bytes([i]) for i in range(len(LABELS))],
        names=[f"n{i}" for i in range(len(LABELS))],
        labels=LABELS if labelled else None,
        class_names=("cat", "dog", "eel", "fox") if named else None,
        fields={
            "size": np.array([5, 3, 9, 1, 5, 3, 9, 1, 0, 255], np.uint8),
            "ratio": np.linspace(0, 0.9, 10),
            "split": np.array(["a", "b"] * 5),
            "code": np.array(["007", "8"] * 5, object),
        },
    )


def left(text: str, source: Source | None = None) -> list[int]:
    found = select(make() if source is None else source, parse(f"set{text}").selectors)
    return [found.item(i)[0] for i in range(len(found))]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", list(range(10))),
        ("[2:4]", [2, 3]),
        ("[-2:]", [8, 9]),
        ("[::4]", [0, 4, 8]),
        ("[5:500]", [5, 6, 7, 8, 9]),
        ("{size==5}", [0, 4]),
        ("{size!=5}", [1, 2, 3, 5, 6, 7, 8, 9]),
        ("{size<1}", [8]),
        ("{size>=255}", [9]),
        ("{size<=300}", list(range(10))),
        ("{size>-1}", list(range(10))),
        ("{size in 3..5}", [0, 1, 4, 5]),
        ("{size in 9,1}", [2, 3, 6, 7]),
        ("{ratio>0.75}", [8, 9]),
        ("{split==b}{size<4}", [1, 3, 5, 7, 9][:4]),
        ("{code==007}[:2]", [0, 2]),
        ("{name in n3,n1}", [1, 3]),
        ("[:5]{size==5}[1:]", [4]),
        ("{size==5}[1:]", [4]),
        ("{label==3}", [3, 7, 9]),
        ("{label==-1}", [8]),
        ("{label>=1}[0:3]", [1, 2, 3]),
        ("{class==dog}", [1, 5]),
        ("{class in 'fox',cat}", [0, 3, 4, 7, 9]),
        ("{label in 1..3}{label<3}", [1, 2, 5, 6]),
    ],
)
def test_what_is_left(text: str, kept: list[int]) -> None:
    assert left(text) == kept


@pytest.mark.parametrize("named", [True, False])
def test_labels_are_renumbered_over_the_admitted_classes(named: bool) -> None:
    found = select(make(named=named), parse("set{label in 1,3}").selectors)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 0, 1, 1]
    assert found.class_names == (("dog", "fox") if named else None)


def test_an_admitted_class_without_items_keeps_its_number() -> None:
    found = select(make(), parse("set[3:4]{label>=1}").selectors)
    assert found.labels is not None
    assert found.labels.tolist() == [2]
    assert found.class_names == ("dog", "eel", "fox")


def test_class_filters_add_up_in_the_old_numbers() -> None:
    found = select(make(), parse("set{label!=0}{class!=eel}").selectors)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 0, 1, -1, 1]
    assert found.class_names == ("dog", "fox")


def test_other_filters_and_ranges_keep_the_classes() -> None:
    found = select(make(), parse("set{size<4}[:2]").selectors)
    assert found.labels is not None
    assert found.labels.tolist() == [1, 3]
    assert found.class_names == ("cat", "dog", "eel", "fox")


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("{label==9}", DataError, r"filter {label==9} of set leaves nothing of its 10 items"),
        ("[20:]", DataError, "the range of set leaves nothing"),
        (
            "{hue==1}",
            DataError,
            "no field hue .*Its fields are class, code, label, name, ratio, size, split",
        ),
        ("{class==cow}", DataError, "no class cow .*Its classes are cat, dog, eel, fox"),
        ("{class in cat,cow}", DataError, "no class cow"),
        ("{size==big}", UsageError, "compares the numbers of size with the text 'big'"),
        ("{label==cat}", UsageError, "Classes have names in the field class"),
        ("{split in 1..3}", UsageError, "spans numbers, but split is text"),
    ],
)
def test_what_cannot_be_selected_says_why(text: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        left(text)


def test_without_labels_there_are_no_class_fields() -> None:
    for field in ("label", "class"):
        with pytest.raises(DataError, match="Its fields are code, name, ratio, size, split"):
            left(f"{{{field}==1}}", make(labelled=False))
    with pytest.raises(DataError, match="no field class"):
        left("{class==cat}", make(named=False))


@given(low=st.integers(-2, 5), high=st.integers(-2, 5))
def test_a_span_is_two_comparisons(low: int, high: int) -> None:
    def kept(text: str) -> list[int]:
        try:
            return left(text)
        except DataError:
            return []

    assert kept(f"{{label in {low}..{high}}}") == kept(f"{{label>={low}}}{{label<={high}}}")
