from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from moon.data.idx import has_idx, open_idx
from moon.data.preprocess import Preprocess
from moon.errors import DataError

IMAGES = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
LABELS = np.array([2, 0, 1], np.uint8)


def idx(values: npt.NDArray[np.uint8]) -> bytes:
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return head + values.tobytes()


def put(folder: Path, images: bytes, labels: bytes | None = None, split: str = "t10k") -> None:
    (folder / f"{split}-images-idx3-ubyte").write_bytes(images)
    if labels is not None:
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


def test_plain_and_gzipped_files(tmp_path: Path) -> None:
    assert not has_idx(tmp_path)
    put(tmp_path, idx(IMAGES), idx(LABELS))
    assert has_idx(tmp_path)
    for split in ("test", None):
        source = open_idx("x", tmp_path, split)
        assert source.labels is not None
        assert source.labels.tolist() == [2, 0, 1]
        assert np.array_equal(np.asarray(source.item(2)), IMAGES[2])


def test_items_are_images_and_so_converted(tmp_path: Path) -> None:
    put(tmp_path, idx(IMAGES))
    source = open_idx("x", tmp_path, "test")
    assert source.labels is None
    to_rgb = Preprocess(crop=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    item = source.item(0)
    assert to_rgb.pixels(item).shape == (8, 8, 3)


def test_splits_and_prefixes(tmp_path: Path) -> None:
    put(tmp_path, idx(IMAGES), split="train")
    put(tmp_path, idx(IMAGES[:2]), split="letters-test")
    assert len(open_idx("x", tmp_path, "train")) == 3
    assert len(open_idx("x", tmp_path, "letters-test")) == 2
    with pytest.raises(DataError, match="no split test; there are letters-test, train"):
        open_idx("x", tmp_path, "test")
    with pytest.raises(DataError, match="several splits"):
        open_idx("x", tmp_path, None)


def test_colour_images(tmp_path: Path) -> None:
    colour = np.arange(90, dtype=np.uint8).reshape(2, 5, 3, 3)
    put(tmp_path, idx(colour))
    assert np.array_equal(np.asarray(open_idx("x", tmp_path, None).item(1)), colour[1])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (b"", None, "is not an idx file"),
        (b"P5 4 4 255 ", None, "is not an idx file"),
        (struct.pack(">HBBI", 0, 13, 1, 0), None, "is not an idx file of uint8"),
        (idx(IMAGES)[:9], None, "could not read"),
        (idx(IMAGES)[:-1], None, r"does not hold the \[3, 4, 5\] values"),
        (idx(IMAGES) + b"x", None, "does not hold"),
        (struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 9) + b"x", None, "does not hold"),
        (idx(LABELS), None, r"shape \[3\]"),
        (idx(IMAGES[:0]), None, r"shape \[0, 4, 5\]"),
        (idx(IMAGES), idx(LABELS[:2]), "3 images but labels of shape"),
    ],
)
def test_damaged_files(tmp_path: Path, images: bytes, labels: bytes | None, message: str) -> None:
    put(tmp_path, images, labels)
    with pytest.raises(DataError, match=message):
        open_idx("x", tmp_path, "test")


def test_damaged_gzip(tmp_path: Path) -> None:
    put(tmp_path, idx(IMAGES), idx(LABELS))
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    for data in (b"junk", whole[: len(whole) // 2], whole[:-6] + b"\0\0" + whole[-4:]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"could not read .*Copy or download it again"):
            open_idx("x", tmp_path, "test")
