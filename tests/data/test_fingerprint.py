"""Fingerprints, and the sketch of a training set that travels with a model."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from moon.data.fingerprint import (
    MOST,
    TrainingSketch,
    fingerprints,
    pixel_fingerprints,
    sketch,
    training_overlap,
)
from moon.data.items import Item, Source
from moon.data.preprocess import Preprocess
from moon.errors import BundleError, DataError

GREY = Preprocess(crop=(4, 4), resize=None, mean=(0.5,), std=(0.5,), interpolation="bilinear")


def numbered(start: int, stop: int) -> Source:
    """Images that are all different: each shows its own number."""
    items: list[Item] = [
        np.frombuffer(i.to_bytes(16, "little"), np.uint8).reshape(4, 4) for i in range(start, stop)
    ]
    return Source(spec=f"{start}..{stop}", items=items)


def encoded(source: Source, kind: str) -> Source:
    items: list[Item] = []
    for i in range(len(source)):
        file = io.BytesIO()
        pixels = source.item(i)
        assert isinstance(pixels, np.ndarray)
        Image.fromarray(pixels).save(file, kind)
        items.append(file.getvalue())
    return Source(spec=kind, items=items)


def test_pixels_are_known_again_in_another_container_and_bytes_are_not() -> None:
    plain = numbered(0, 20)
    rows = np.arange(20)
    files = [encoded(plain, kind) for kind in ("PNG", "BMP", "TIFF")]
    wanted = pixel_fingerprints(plain, rows, GREY)
    assert len(set(wanted.tolist())) == 20
    for one in files:
        assert pixel_fingerprints(one, rows, GREY).tolist() == wanted.tolist()
        assert not np.isin(fingerprints(one, rows), fingerprints(plain, rows)).any()
    rgb = Preprocess(crop=(4, 4), resize=None, mean=(0.5,) * 3, std=(0.5,) * 3,
                     interpolation="bilinear")  # fmt: skip
    assert not np.isin(pixel_fingerprints(files[0], rows, rgb), wanted).any()


def test_a_small_set_is_sketched_whole_and_a_large_one_by_a_fixed_sample() -> None:
    small = sketch(numbered(0, 100), GREY, np.arange(10, 60))
    assert (small.images, small.sampled, small.finds) == (50, 50, 1)
    wanted = pixel_fingerprints(numbered(10, 60), np.arange(50), GREY)
    assert small.fingerprints.tolist() == sorted(wanted.tolist())
    large = sketch(numbered(0, 5000), GREY)
    assert (large.images, large.sampled) == (5000, MOST)
    assert large == sketch(numbered(0, 5000), GREY)
    assert large != sketch(numbered(0, 5000), GREY, seed=1)
    assert len(large.to_bytes()) < 12_000
    part = sketch(numbered(0, 5000), GREY, np.arange(3000, 5000))
    inside = pixel_fingerprints(numbered(3000, 5000), np.arange(2000), GREY)
    assert (part.images, part.sampled) == (2000, MOST)
    assert np.isin(part.fingerprints, inside).all()
    with pytest.raises(DataError, match="holds no training images"):
        sketch(numbered(0, 0), GREY)


def test_the_overlap_is_counted_and_estimated() -> None:
    known = sketch(numbered(0, 5000), GREY)
    # 300 trained on, 200 not; those sampled are found, and no others.
    found = training_overlap(known, numbered(4700, 5200), None, GREY)
    assert found is not None
    sampled = np.isin(pixel_fingerprints(numbered(4700, 5000), np.arange(300), GREY),
                      known.fingerprints)  # fmt: skip
    assert found.rows.tolist() == np.flatnonzero(sampled).tolist()
    assert (found.of, found.matches) == (500, int(sampled.sum()))
    assert found.estimated == round(found.matches * 5000 / 1024)
    assert abs(found.estimated - 300) < 4 * np.sqrt(300 * (5000 / 1024 - 1))
    every = training_overlap(known, numbered(0, 5000), None, GREY)
    assert every is not None
    assert (every.matches, every.estimated) == (MOST, 5000)
    some = training_overlap(known, numbered(0, 5000), [*found.rows + 4700, 5], GREY)
    assert some is not None
    assert some.rows[: found.matches].tolist() == list(range(found.matches))
    assert some.estimated == some.of, "never more than were looked at"


def test_none_is_found_among_others_and_nothing_without_a_sketch() -> None:
    found = training_overlap(sketch(numbered(0, 5000), GREY), numbered(5000, 6000), None, GREY)
    assert found is not None
    assert (found.matches, found.estimated) == (0, 0)
    assert training_overlap(None, numbered(0, 1), None, GREY) is None

    class Bundle:
        training = sketch(numbered(0, 9), GREY)

    held = training_overlap(Bundle(), numbered(8, 10), None, GREY)
    assert held is not None
    assert held.matches == 1


def test_so_many_are_noticed_as_it_says() -> None:
    """Exactly: the chance that a sample of M of N misses all of d is hypergeometric."""
    for images, sampled in ((5000, 1024), (54_000, 1024), (1100, 1024), (1_281_167, 1024)):
        finds = TrainingSketch(images=images, fingerprints=np.zeros(sampled, np.uint64)).finds

        def missed(d: int, images: int = images, sampled: int = sampled) -> float:
            return float(np.prod([max(0, images - sampled - i) / (images - i) for i in range(d)]))

        assert missed(finds) <= 0.05 < missed(max(0, round(0.9 * finds) - 1)), (images, finds)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40), st.integers(0, 10**7))
def test_it_round_trips(values: list[int], more: int) -> None:
    found = np.sort(np.array(values, np.uint64))
    one = TrainingSketch(images=len(values) + more, fingerprints=found)
    again = TrainingSketch.from_json(json.loads(one.to_bytes()), "training.json")
    assert again == one
    assert hash(again) == hash(one)
    assert again.fingerprints.dtype == np.uint64
    assert again.to_bytes() == one.to_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "has schema 2, this moon reads 1"),
        ({"schema": True}, "has schema True"),
        ({"images": 2}, "samples 3 of 2 images"),
        ({"images": 3.0}, "images in training.json must be a whole number"),
        ({"sampled": 0}, "samples 0 of 9"),
        ({"sampled": 2000, "images": 9000}, "samples 2000 of 9000"),
        ({"sampled": 4}, "has not 4 fingerprints but 24 bytes"),
        ({"fingerprints": "?" * 32}, "are not base64"),
        ({"fingerprints": "ü"}, "are not base64"),
        ({"fingerprints": [1, 2, 3]}, "must be text"),
        ({"extra": 1}, "unknown field extra"),
        ({"images": None}, "whole number"),
    ],
)
def test_what_is_not_a_sketch_is_refused(change: dict[str, Any], message: str) -> None:
    data = base64.b64encode(bytes(24)).decode()
    plain = {"schema": 1, "images": 9, "sampled": 3, "fingerprints": data}
    assert TrainingSketch.from_json(plain, "training.json").sampled == 3
    with pytest.raises(BundleError, match=message):
        TrainingSketch.from_json({**plain, **change}, "training.json", BundleError)
    with pytest.raises(DataError, match="must be a JSON object"):
        TrainingSketch.from_json([], "training.json")
