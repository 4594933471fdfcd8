from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from moon.data.folder import open_folder, open_imglist
from moon.errors import DataError
from tests.conftest import encode

PNG = encode(np.zeros((4, 4), np.uint8))


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PNG)


def names(root: Path) -> list[str]:
    source = open_folder("x", root)
    return [source.name(i) for i in range(len(source))]


def test_one_folder_a_class(class_folder: Path) -> None:
    source = open_folder("x", class_folder)
    assert source.class_names == ("ant", "bee", "cow")
    assert source.labels is not None
    assert source.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 2
    assert source.name(4) == "bee/0.png"
    assert source.item(4) == class_folder / "bee" / "0.png"


def test_a_flat_folder_has_no_labels_and_is_sorted(tmp_path: Path) -> None:
    put(tmp_path, "b.PNG", "a10.png", "a9.png")
    (tmp_path / "notes.txt").write_text("")
    source = open_folder("x", tmp_path)
    assert names(tmp_path) == ["a10.png", "a9.png", "b.PNG"]
    assert source.labels is None
    assert source.class_names is None


def test_class_folders_may_be_deep_and_hidden_things_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "cat/z.png", "cat/sub/deep/a.png", "dog/b.png")
    put(tmp_path, ".cache/x.png", "cat/._z.png", "cat/.x/y.png", "__MACOSX/cat/z.png", ".z.png")
    assert names(tmp_path) == ["cat/sub/deep/a.png", "cat/z.png", "dog/b.png"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    put(tmp_path, "real/cat/a.png", "set/dog/b.png")
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "real" / "cat")
    (tmp_path / "set" / "dog" / "loop").symlink_to(tmp_path / "set" / "dog")
    assert names(tmp_path / "set") == ["cat/a.png", "dog/b.png"]


def test_odd_folders_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images in .*Images end in \.bmp"):
        open_folder("x", tmp_path)
    put(tmp_path, "cat/a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"class folder .*empty has no images"):
        open_folder("x", tmp_path)
    put(tmp_path, "loose.png")
    with pytest.raises(DataError, match=r"both images \(loose\.png\) and folders of images \(cat"):
        open_folder("x", tmp_path)


def test_a_folder_too_high_is_noticed(tmp_path: Path) -> None:
    put(tmp_path, "train/cat/a.png", "train/dog/b.png", "test/cat/c.png")
    with pytest.raises(DataError, match=r"\(test, train\) hold no images but more folders.*/test"):
        open_folder("x", tmp_path)


def test_names_that_are_not_utf8_can_be_shown(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(PNG)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    source = open_folder("x", tmp_path)
    assert source.name(0) == "caf�.png"
    item = source.item(0)
    assert isinstance(item, Path)
    assert item.read_bytes() == PNG


def listing(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "list.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_imglist(tmp_path: Path) -> None:
    put(tmp_path, "d/a.png", "d/b c.png", "d/e.png")
    path = listing(tmp_path, "\ufeffd/a.png 3\n\nd/b c.png -1\r\nd/e.png  0\n")
    source = open_imglist("x", path, tmp_path)
    assert source.labels is not None
    assert source.labels.tolist() == [3, -1, 0]
    assert [source.item(i) for i in range(3)] == [
        tmp_path / "d" / name for name in ("a.png", "b c.png", "e.png")
    ]
    assert source.name(1) == "d/b c.png"


def test_imglist_without_labels(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    assert open_imglist("x", listing(tmp_path, "a.png\nb.png\n"), tmp_path).labels is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no images"),
        ("\n \n", "names no images"),
        ("a.png 0\na.png\n", "line 2 of .* has no label, unlike"),
        ("a.png\na.png 0\n", "line 2 of .* has a label, unlike"),
        ("a.png -2\n", "item 0 of .* has the label -2"),
        ("a.png 99999999999999999999\n", "which is no class"),
        ("../a.png 0\n", "outside the root folder"),
        ("/etc/a.png 0\n", "outside the root folder"),
        ("gone.png 0\n", r"there is no file .*gone\.png. Give the folder"),
    ],
)
def test_bad_imglists(tmp_path: Path, text: str, message: str) -> None:
    put(tmp_path, "a.png")
    with pytest.raises(DataError, match=message):
        open_imglist("x", listing(tmp_path, text), tmp_path)


def test_an_imglist_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="could not read the image list"):
        open_imglist("x", path, tmp_path)


def test_the_same_folder_elsewhere_is_the_same_source(class_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in ("cow", "ant", "bee"):
        shutil.copytree(class_folder / name, copy / name)
    assert names(copy) == names(class_folder)
