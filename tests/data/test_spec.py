from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.data.spec import Filter, Range, Spec, number, parse
from moon.errors import UsageError


def test_parts_in_any_order() -> None:
    assert parse("x.npz") == Spec(base="x.npz", split=None, selectors=())
    assert parse(" d/x.npz#test [2:5] { label in 0..7 }") == Spec(
        base="d/x.npz",
        split="test",
        selectors=(
            Range(start=2, stop=5, step=None),
            Filter(field="label", op="span", values=("0", "7"), text="{ label in 0..7 }"),
        ),
    )
    first, second = parse("x{a==1}[:9]").selectors
    assert isinstance(first, Filter)
    assert isinstance(second, Range)


@pytest.mark.parametrize(
    ("text", "op", "values"),
    [
        ("{f==3}", "==", ("3",)),
        ("{f!= -1}", "!=", ("-1",)),
        ("{f<=2.5}", "<=", ("2.5",)),
        ("{f >= 1e3}", ">=", ("1e3",)),
        ("{f<a b}", "<", ("a b",)),
        ("{f>0}", ">", ("0",)),
        ("{f==goldfish, Carassius}", "==", ("goldfish, Carassius",)),
        ("{f=='a'}", "==", ("a",)),
        ("{f in 1,2, 3}", "among", ("1", "2", "3")),
        ("{f in cat}", "among", ("cat",)),
        ("{f in 'a, b',\"c\"}", "among", ("a, b", "c")),
        ('{f in "a, b", c}', "among", ("a, b", "c")),
        ("{f in -2..2}", "span", ("-2", "2")),
        ("{f in 0.5 .. 1.5}", "span", ("0.5", "1.5")),
        ("{f in a..b}", "among", ("a..b",)),
    ],
)
def test_filters(text: str, op: str, values: tuple[str, ...]) -> None:
    (found,) = parse(f"x{text}").selectors
    assert found == Filter(field="f", op=op, values=values, text=text)


@pytest.mark.parametrize(
    ("text", "start", "stop", "step"),
    [
        ("[:]", None, None, None),
        ("[1:]", 1, None, None),
        ("[:-5]", None, -5, None),
        ("[ 0 : 10 : 2 ]", 0, 10, 2),
        ("[::3]", None, None, 3),
    ],
)
def test_ranges(text: str, start: int | None, stop: int | None, step: int | None) -> None:
    assert parse(f"x{text}").selectors == (Range(start=start, stop=stop, step=step),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the source is empty"),
        ("  ", "the source is empty"),
        ("#test", "names no file"),
        ("[0:5]", "names no file"),
        ("x[5]", r"cannot read the range \[5\]. Write \[a:b\]"),
        ("x[a:b]", "cannot read the range"),
        ("x[::0]", "cannot read the range"),
        ("x[::-1]", "cannot read the range"),
        ("x[0:9999999999999999999]", "cannot read the range"),
        ("x{}", "cannot read the filter {}"),
        ("x{label}", "cannot read the filter"),
        ("x{label=3}", "cannot read the filter"),
        ("x{label==}", "cannot read the filter"),
        ("x{label in }", "cannot read the filter"),
        ("x{label in 1,,2}", "cannot read the filter"),
        ("x{__import__('os')}", "cannot read the filter"),
        ("x#a b", "cannot read #a b"),
        ("x.npz#test[0:5", r"cannot read #test\[0:5"),
        ("x#", "cannot read #"),
    ],
)
def test_what_is_not_of_the_grammar_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text)


def test_a_path_that_exists_is_not_taken_apart(tmp_path: Path) -> None:
    for name in ("photos[1:2]", "set#2", "a{b==1}", "x#y[0:1]"):
        folder = tmp_path / name
        folder.mkdir()
        assert parse(str(folder)).base == str(folder)
        assert parse(f"{folder}[0:3]") == Spec(
            base=str(folder), split=None, selectors=(Range(start=0, stop=3, step=None),)
        )
    assert parse("no#where/x.png").base == "no#where/x.png"


@given(st.text(alphabet="ab.#[]{}:=<>! in0123,'\"/\0\n-", max_size=30))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse(text).base


def test_numbers() -> None:
    assert [number(text) for text in ("7", "-7", "+1", "1.5", ".5", "1e3")] == [
        7, -7, 1, 1.5, 0.5, 1000.0,
    ]  # fmt: skip
    for text in ("nan", "inf", "", "1_000", "0x1", "1e", "9" * 5000):
        assert number(text) is None
