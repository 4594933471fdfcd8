"""training.json with sketches of the images that scores were fitted to."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from moon.data.fingerprint import TrainingSketch
from moon.data.training_file import FittedSketch, TrainingFile
from moon.errors import BundleError, DataError


def some(*prints: int, more: int = 0) -> TrainingSketch:
    return TrainingSketch(images=len(prints) + more, fingerprints=np.array(prints, np.uint64))


ONE = FittedSketch(("knn", "vim"), some(1, 2**63, more=90))
TWO = FittedSketch(("temperature",), some(7))


@pytest.mark.parametrize("training", [None, some(3, 4)])
@pytest.mark.parametrize("fitted", [(ONE,), (ONE, TWO)])
def test_it_round_trips(training: TrainingSketch | None, fitted: tuple[FittedSketch, ...]) -> None:
    given = TrainingFile(training, fitted)
    data = given.to_bytes()
    assert data is not None
    again = TrainingFile.from_json(json.loads(data), "training.json")
    assert again == given and again.to_bytes() == data


def test_without_them_it_is_the_file_of_earlier_releases() -> None:
    sketch = some(3, 4, more=1)
    assert TrainingFile(sketch).to_bytes() == sketch.to_bytes()
    assert TrainingFile.from_json(sketch.to_json(), "x") == TrainingFile(sketch)
    assert TrainingFile().to_bytes() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "has schema 2, this moon reads 1"),
        ({"schema": True}, "has schema True"),
        ({"images": 1}, "x has no field sampled"),
        ({"extra": 1}, "x has no field images"),
        ({"fitted": []}, "fitted in x must be a list that is not empty"),
        ({"fitted": {}}, "fitted in x must be a list"),
        ({"fitted": [3]}, "fitted in x must be a JSON object"),
        ({"fitted": [{}]}, "fitted in x has no field scores"),
    ],
)
def test_what_is_not_such_a_file_is_refused(change: dict[str, Any], message: str) -> None:
    plain = json.loads(TrainingFile(None, (TWO,)).to_bytes() or b"")
    with pytest.raises(BundleError, match=message):
        TrainingFile.from_json({**plain, **change}, "x", BundleError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": []}, "names none"),
        ({"scores": "vim"}, "scores in fitted in x must be"),
        ({"images": 0}, "samples 1 of 0 images"),
        ({"schema": 1}, "unknown field schema"),
    ],
)
def test_a_wrong_entry_is_refused(change: dict[str, Any], message: str) -> None:
    plain = json.loads(TrainingFile(some(3), (TWO,)).to_bytes() or b"")
    plain["fitted"][0] |= change
    with pytest.raises(DataError, match=message):
        TrainingFile.from_json(plain, "x")
