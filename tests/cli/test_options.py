"""How words become options."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.cli.options import named_sources, spread
from moon.errors import UsageError


@pytest.mark.parametrize(
    ("given_words", "expected"),
    [
        ("--set a=1 b=2 --out r", "--set a=1 --set b=2 --out r"),
        ("--set a=1 --set b=2", "--set a=1 --set b=2"),
        ("--set moon.w_final=1 data.val=2 recipe", "--set moon.w_final=1 --set data.val=2 recipe"),
        ("--near c-100=x d=y --far z=w", "--near c-100=x --near d=y --far z=w"),
        ("one.moon two=2.moon --near a=b", "one.moon two=2.moon --near a=b"),
        ("--set a=1 recipe b=2", "--set a=1 recipe b=2"),
        ("--out r x=1", "--out r x=1"),
        ("--set a=1 -- b=2", "--set a=1 -- b=2"),
        ("--near a=b dir/with=equals.moon", "--near a=b dir/with=equals.moon"),
    ],
)
def test_values_after_a_repeated_option(given_words: str, expected: str) -> None:
    assert spread(given_words.split()) == expected.split()


@given(st.lists(st.sampled_from(["--set", "--out", "a=1", "b", "--", "x=y"]), max_size=8))
def test_spreading_only_adds_option_names(words: list[str]) -> None:
    result = spread(words)
    kept = iter(result)
    assert all(word in kept for word in words)  # a subsequence, in order
    assert len(result) - len(words) == result.count("--set") - words.count("--set")
    assert spread(result) == result or "--" in words


def test_named_sources_keep_their_order_and_equals_signs() -> None:
    words = ["b=sklearn:digits#test{label==8}", "a=folder"]
    assert list(named_sources("--near", words).items()) == [
        ("b", "sklearn:digits#test{label==8}"),
        ("a", "folder"),
    ]


@pytest.mark.parametrize("word", ["folder", "=folder", "name=", ""])
def test_a_source_without_a_name_is_wrong(word: str) -> None:
    with pytest.raises(UsageError, match="is not NAME=SOURCE"):
        named_sources("--near", [word])


def test_a_name_twice_is_wrong() -> None:
    with pytest.raises(UsageError, match="names 'a' twice"):
        named_sources("--far", ["a=x", "a=y"])
