from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moon.data.load import load_pixels
from moon.data.preprocess import Preprocess
from moon.data.source import open_source
from moon.errors import DataError, MoonError
from tests.conftest import encode

RGB32 = Preprocess(crop=(32, 32), resize=32, mean=(0.5,) * 3, std=(0.5,) * 3)
GREY28 = Preprocess(crop=(28, 28), mean=(0.1307,), std=(0.3081,))


def test_a_folder_with_selections_keeps_the_whole_string(class_folder: Path) -> None:
    spec = f"{class_folder}{{class in ant,cow}}[1:]"
    source = open_source(spec)
    assert source.spec == spec
    assert [source.name(i) for i in range(len(source))] == [
        "ant/1.png", "ant/2.png", "ant/3.png", "cow/0.png", "cow/1.png",
    ]  # fmt: skip
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    assert open_source(class_folder).class_names == ("ant", "bee", "cow")


def test_items_without_names_are_numbered_in_the_whole_set(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, test_images=np.zeros((9, 2, 2), np.uint8), test_labels=np.arange(9) // 3)
    source = open_source(f"{path}#test{{label==2}}[1:]")
    assert source.name(0) == f"{path}#test[7]"
    assert open_source(source.name(0).replace("[7]", "[7:8]")).labels == [2]


def test_imglists_with_and_without_a_root(class_folder: Path) -> None:
    listing = class_folder / "list.txt"
    listing.write_text("ant/0.png 0\nbee/0.png 1\n")
    assert len(open_source(str(listing))) == 2
    assert len(open_source(f"{listing}@{class_folder}[:1]")) == 1
    elsewhere = class_folder.parent / "list.txt"
    shutil.move(listing, elsewhere)
    assert open_source(f"{elsewhere}@{class_folder}").item(1) == class_folder / "bee/0.png"
    with pytest.raises(DataError, match="there is no folder /nowhere for the image list"):
        open_source(f"{elsewhere}@/nowhere")


def test_an_at_sign_in_a_folder(class_folder: Path) -> None:
    folder = class_folder.rename(class_folder.parent / "me@home")
    (folder / "a.txt").write_text("ant/0.png 0\n")
    assert len(open_source(f"{folder}/a.txt@{folder}")) == 1
    assert len(open_source(str(folder))) == 9


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("/no/where", "there is no file or folder /no/where"),
        ("/no/where.txt@/tmp", r"there is no file or folder /no/where\.txt"),
        ("{tmp}#train", "has no splits, so none called train"),
        ("{tmp}/one.png", "is one image, not a set. Give the folder"),
        ("{tmp}/notes.md", "no kind of image set .*Give a folder, an imglist"),
        ("{tmp}/list.txt#a", "has no splits"),
        ("{tmp}", "no images in"),
        ("sklearn:nope", "there is no sklearn:nope"),
        ("~nobody-by-this-name/x", "home"),
        ("x" * 5000, "there is no file or folder|could not read"),
    ],
)
def test_what_is_no_source_says_why(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "notes.md").write_text("")
    (tmp_path / "list.txt").write_text("")
    if "one.png" in spec:
        (tmp_path / "one.png").write_bytes(encode(np.zeros((2, 2), np.uint8)))
    with pytest.raises(DataError, match=message):
        open_source(spec.replace("{tmp}", str(tmp_path)))


def test_opening_and_decoding_need_no_heavy_package(class_folder: Path) -> None:
    code = """
import sys
from moon.data import Preprocess, load_pixels, open_source
source = open_source(sys.argv[1])
load_pixels(source, Preprocess(crop=(8, 8), mean=(0.5,), std=(0.5,)))
heavy = {"torch", "torchvision", "sklearn", "pyarrow", "onnx", "matplotlib"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(class_folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("spec", "count", "classes"),
    [
        ("cifar10.npz#test[:200]", 200, 10),
        ("cifar10.npz#train{label in 0..5}[-100:]", 100, 6),
        ("mnist.npz#test{label in 8,9}", 1983, 2),
        ("tinyimagenet32_test.npz#test{cifar10_overlap==0}", 8350, 200),
        ("svhn_test.npz#test[::100]", 100, 10),
        ("dtd10_test.npz#test{class in braided,banded}", 240, 2),
        ("notmnist_test.npz[:100]", 100, 10),
    ],
)
def test_real_sets(shared_data: Path, spec: str, count: int, classes: int) -> None:
    source = open_source(f"{shared_data}/{spec}")
    assert len(source) == count
    assert source.class_names is not None
    assert len(source.class_names) == classes
    for preprocess in (RGB32, GREY28):
        pixels = load_pixels(source, preprocess, np.arange(0, count, 7))
        assert pixels.shape[1:] == preprocess.shape
        assert 5 < pixels.std() < 128


def test_the_same_digits_from_two_formats(shared_data: Path, tmp_path: Path) -> None:
    packed = open_source(f"{shared_data}/mnist.npz#test[:50]")
    for i in range(len(packed)):
        item = packed.item(i)
        assert isinstance(item, bytes)
        (tmp_path / f"{i:03d}.png").write_bytes(item)
    assert np.array_equal(
        load_pixels(packed, GREY28), load_pixels(open_source(str(tmp_path)), GREY28)
    )


def test_fashion_mnist_in_idx_files() -> None:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    source = open_source(f"{folder}#test")
    assert source.labels is not None
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert load_pixels(source, GREY28, range(100)).shape == (100, 28, 28, 1)
    with pytest.raises(MoonError, match="no split val; there are test, train"):
        open_source(f"{folder}#val")
