"""Broken ONNX files never end the process, and are refused or run as ONNX Runtime runs them."""

from __future__ import annotations

import pytest

from .fuzz_models import seeds
from .fuzzing import Judge, Mutator
from .graphs import opened


def _fuzz(seed: int, count: int) -> Judge:
    mutator, judge = Mutator(seed, seeds()), Judge()
    try:
        for number in range(count):
            data = mutator.next()
            try:
                judge.check(data)
            except AssertionError as error:
                raise AssertionError(f"file {number} of seed {seed}: {data.hex()}") from error
    finally:
        judge.close()
    return judge


def test_the_models_that_are_broken_are_right_before(engine_cache: None) -> None:
    judge, whole = Judge(), 0
    for data in dict.fromkeys(seeds()):
        judge.check(data)
        whole += opened(data).isa == ""
    judge.close()
    assert judge.seen["agreed"] > 50 and not judge.seen["ran alone"]
    assert judge.seen["refused"] < 3  # paddings that ONNX Runtime makes negative
    assert whole < 2


def test_some_broken_models(engine_cache: None) -> None:
    judge = _fuzz(0, 600)
    assert judge.seen["refused"] > 100 and judge.seen["agreed"] > 50, judge.seen


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_broken_models(engine_cache: None, seed: int) -> None:
    _fuzz(seed, 20_000)
