from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moon.data.items import Source
from moon.data.load import data_sha256, load_pixels, match_labels, stream
from moon.data.preprocess import Preprocess
from moon.data.source import open_source
from moon.errors import DataError, ImageError, UsageError
from tests.conftest import encode

SMALL = Preprocess(crop=(2, 2), mean=(0.5,), std=(0.5,))


def numbered(count: int) -> Source:
    """Item i is 2x2 pixels of i % 256."""
    return Source(
        spec="n",
        items=[encode(np.full((2, 2), i % 256, np.uint8)) for i in range(count)],
        labels=np.arange(count) % 3,
    )


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_load_pixels_in_order_with_any_number_of_threads(workers: int | None) -> None:
    source = numbered(300)
    pixels = load_pixels(source, SMALL, workers=workers)
    assert pixels.shape == (300, 2, 2, 1)
    assert pixels[:, 1, 0, 0].tolist() == [i % 256 for i in range(300)]
    some = load_pixels(source, SMALL, [7, 7, 2], workers=workers)
    assert some[:, 0, 0, 0].tolist() == [7, 7, 2]
    assert load_pixels(source, SMALL, [], workers=workers).shape == (0, 2, 2, 1)


def test_stream_yields_indices_and_a_last_small_batch() -> None:
    batches = list(stream(numbered(10), SMALL, 4, indices=[9, 1, 2, 3, 4, 5]))
    assert [indices.tolist() for indices, _ in batches] == [[9, 1, 2, 3], [4, 5]]
    assert [pixels[:, 0, 0, 0].tolist() for _, pixels in batches] == [[9, 1, 2, 3], [4, 5]]
    assert list(stream(numbered(3), SMALL, 4, indices=[])) == []


class Counted:
    """Items that say how many of them were asked for."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        with self._lock:
            self.asked += 1
        return np.full((2, 2), index % 256, np.uint8)


@pytest.mark.parametrize("workers", [1, 4])
def test_stream_looks_only_two_batches_ahead_and_stops_when_left(workers: int) -> None:
    items = Counted(10_000)
    before = threading.active_count()
    batches = stream(Source(spec="c", items=items), SMALL, 10, workers=workers)
    assert items.asked == 0
    next(batches)
    time.sleep(0.05)
    assert items.asked <= 30
    batches.close()
    assert items.asked <= 30
    assert threading.active_count() == before


def test_large_images_get_threads_and_small_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from moon.data import load

    monkeypatch.setattr(load, "_cores", lambda: 5)
    chosen = np.arange(50)
    small = Source(spec="s", items=[np.zeros((2, 2), np.uint8)] * 50)
    large = Source(spec="l", items=[Image.new("RGB", (1500, 1500))] * 50)
    assert load._threads(small, SMALL, chosen) == 1
    assert load._threads(large, SMALL, chosen) == 5
    assert load._threads(large, SMALL, chosen[:2]) == 1


def test_progress_reaches_the_total() -> None:
    calls: list[tuple[int, int, str]] = []
    load_pixels(numbered(2500), SMALL, progress=lambda *call: calls.append(call))
    assert calls == [(1024, 2500, "decoding"), (2048, 2500, "decoding"), (2500, 2500, "decoding")]


@pytest.mark.parametrize("workers", [None, 1, 4])
def test_an_error_names_the_item(tmp_path: Path, workers: int | None) -> None:
    items = [encode(np.zeros((2, 2), np.uint8))] * 200
    items[150] = items[150][:40]
    with pytest.raises(ImageError, match=r"^n\[150\]: the image is truncated"):
        load_pixels(Source(spec="n", items=items), SMALL, workers=workers)
    (tmp_path / "a.png").write_bytes(items[0])
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=rf"^{tmp_path}/b\.png is not an image"):
        load_pixels(open_source(str(tmp_path)), SMALL, workers=workers)
    arrays = Source(spec="n", items=[np.zeros((3, 2), np.uint8)])
    with pytest.raises(ImageError, match=r"^n\[0\]: the array must have the shape \[2, 2, 1\]"):
        load_pixels(arrays, SMALL, workers=workers)


def test_arguments_out_of_range() -> None:
    for wrong in ([10], [-1]):
        with pytest.raises(DataError, match=rf"n has 10 items, so no item {wrong[0]}"):
            load_pixels(numbered(10), SMALL, wrong)
    with pytest.raises(UsageError, match="batch size must be at least 1"):
        stream(numbered(1), SMALL, 0)
    with pytest.raises(UsageError, match="threads must be at least 1"):
        load_pixels(numbered(1), SMALL, workers=0)


def labelled(labels: list[int] | None, names: tuple[str, ...] | None) -> Source:
    count = 4 if labels is None else len(labels)
    values = None if labels is None else np.array(labels)
    return Source(spec="m", items=[b""] * count, labels=values, class_names=names)


def test_labels_match_by_name_or_else_by_number() -> None:
    classes = ("dog", "cat", "eel")
    named = match_labels(labelled([0, 1, 2, -1], ("cat", "cow", "dog")), classes)
    assert named is not None
    assert named.tolist() == [1, -1, 0, -1]
    numbers = match_labels(labelled([2, 0, -1], None), classes)
    assert numbers is not None
    assert numbers.tolist() == [2, 0, -1]
    assert match_labels(labelled(None, None), classes) is None
    with pytest.raises(DataError, match=r"m\[1\] has the label 3, but the model has 3 classes"):
        match_labels(labelled([0, 3], None), classes)


def test_the_hash_sees_bytes_labels_and_order_but_not_places(class_folder: Path) -> None:
    source = open_source(str(class_folder))
    first = data_sha256(source)
    moved = class_folder.rename(class_folder.parent / "moved")
    assert data_sha256(open_source(str(moved))) == first
    assert data_sha256(open_source(str(moved)), np.arange(9)) == first
    assert data_sha256(open_source(str(moved)), np.arange(9)[::-1]) != first
    assert data_sha256(open_source(f"{moved}[:8]")) != first
    (moved / "cow" / "1.png").rename(moved / "bee" / "3.png")
    assert data_sha256(open_source(str(moved))) != first


def test_the_hash_tells_pixels_of_other_shapes_apart() -> None:
    zeros = [np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), Image.new("L", (2, 3))]
    hashes = {data_sha256(Source(spec="z", items=[item])) for item in zeros}
    assert len(hashes) == 3
    two = [Source(spec="z", items=items) for items in ([b"ab", b"c"], [b"a", b"bc"])]
    assert data_sha256(two[0]) != data_sha256(two[1])
