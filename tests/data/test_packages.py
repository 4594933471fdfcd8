from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moon.data.packages import open_sklearn, open_torchvision
from moon.data.preprocess import Preprocess
from moon.data.source import open_source
from moon.errors import DataError


def test_digits_split_is_fixed_and_stratified() -> None:
    whole = open_sklearn("s", "digits", None)
    train = open_sklearn("s", "digits", "train")
    test = open_sklearn("s", "digits", "test")
    assert (len(whole), len(train), len(test)) == (1797, 1258, 539)
    names = {source.name(i) for source in (train, test) for i in range(len(source))}
    assert len(names) == 1797
    assert whole.labels is not None
    assert test.labels is not None
    shares = np.bincount(test.labels) / np.bincount(whole.labels)
    assert abs(shares - 0.3).max() < 0.01
    # The names say where in the whole set an item is.
    assert test.name(0) == "sklearn:digits[1]"
    first = np.asarray(whole.item(1))
    assert np.array_equal(np.asarray(test.item(0)), first)
    assert (first.dtype, first.shape, first.max()) == (np.uint8, (8, 8), 255)
    assert whole.class_names == tuple("0123456789")


def test_photos_are_the_tiles_of_two_photographs() -> None:
    from sklearn.datasets import load_sample_images

    source = open_sklearn("s", "photos", None)
    photo = load_sample_images().images[1]
    assert len(source) == 2 * 13 * 20
    assert source.labels is None
    # Item 260 + 20 * 2 + 3 is row 2, column 3 of the second photograph.
    assert np.array_equal(np.asarray(source.item(303)), photo[64:96, 96:128])
    small = Preprocess(crop=(8, 8), mean=(0.5,), std=(0.5,))
    item = source.item(0)
    assert small.pixels(item).shape == (8, 8, 1)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("digits", "val", "no split val; its splits are train, test"),
        ("photos", "test", "no split test; its splits are none"),
        ("iris", None, "the sets are digits, photos"),
    ],
)
def test_other_sklearn_sets(name: str, split: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_sklearn("s", name, split)


def write_idx(path: Path, values: np.ndarray) -> None:
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(head + values.astype(np.uint8).tobytes())


def test_a_torchvision_set_that_is_there(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.arange(2 * 28 * 28, dtype=np.uint64).reshape(2, 28, 28) % 251
    for part, count in (("train", 2), ("t10k", 1)):
        write_idx(raw / f"{part}-images-idx3-ubyte", images[:count])
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.array([7, 2])[:count])
    train = open_source(f"torchvision:mnist@{tmp_path}")
    test = open_source(f"torchvision:MNIST@{tmp_path}#test")
    assert (len(train), len(test)) == (2, 1)
    assert train.labels is not None
    assert train.labels.tolist() == [7, 2]
    assert train.class_names == tuple("0123456789")
    assert np.array_equal(np.asarray(train.item(1)), images[1])
    assert train.name(1) == f"torchvision:mnist@{tmp_path}[1]"
    assert open_source(f"torchvision:MNIST@{tmp_path}#train{{class==2}}").name(0).endswith("[1]")


def test_labels_of_sets_that_keep_them_as_pairs(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "x.png")
    source = open_torchvision("t", "ImageFolder", tmp_path, None)
    assert source.class_names == ("cat", "dog")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("Nothing", None, "torchvision has no data set Nothing. It has CIFAR10, CIFAR100"),
        ("CIFAR10", "val", "no split val; it has train and test"),
        ("SVHN", "foo", "refuses .*Valid values are"),
        ("EMNIST", None, "needs a split. Write torchvision:EMNIST#SPLIT"),
        ("FakeData", None, "is not a data set that lies in a folder"),
        ("ImageFolder", "x", "has no splits"),
        ("ImageFolder", None, "could not be downloaded"),
        ("ImageNet", "val", "could not be downloaded .*Put its files there"),
    ],
)
def test_what_torchvision_cannot_give(
    tmp_path: Path, name: str, split: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_torchvision("t", name, tmp_path, split)


def test_a_download_that_fails_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # An address where nobody listens stands for a machine without a network.
    from torchvision.datasets import SVHN

    nobody = ["http://127.0.0.1:9/test.mat", "test.mat", "0" * 32]
    monkeypatch.setattr(SVHN, "split_list", {"test": nobody})
    with pytest.raises(DataError, match=r"SVHN is not in .* could not be downloaded .*@FOLDER"):
        open_torchvision("t", "SVHN", tmp_path, "test")
    assert capsys.readouterr().out == ""


def test_damaged_files_are_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    (folder / "test_batch").write_bytes(gzip.compress(pickle.dumps({})))
    with pytest.raises(DataError, match="CIFAR10"):
        open_torchvision("t", "CIFAR10", tmp_path, "test")
