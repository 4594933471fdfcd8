from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.data.items import Source
from moon.data.npz import open_npz
from moon.errors import DataError
from tests.conftest import encode

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 6, 5), dtype=np.uint8)
FILES = [encode(image) for image in IMAGES]
PACKED = {
    "jpeg": np.frombuffer(b"".join(FILES), np.uint8),
    "offsets": np.cumsum([0, *map(len, FILES)]),
    "labels": np.array([0, 1, 1, 2], np.uint8),
}


def save(tmp_path: Path, arrays: dict[str, Any]) -> Path:
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    return path


def packed(split: str, **changes: Any) -> dict[str, Any]:
    return {f"{split}_{key}": value for key, value in {**PACKED, **changes}.items()}


def items(source: Source) -> list[Any]:
    return [source.item(i) for i in range(len(source))]


def test_packed_files_come_back_byte_for_byte(tmp_path: Path) -> None:
    path = save(tmp_path, {**packed("test"), "class_names": np.array(["a", "b", "c"])})
    for split in ("test", None):
        source = open_npz("x.npz#test", path, split)
        assert items(source) == FILES
        assert source.labels is not None
        assert source.labels.tolist() == [0, 1, 1, 2]
        assert source.class_names == ("a", "b", "c")
        assert source.name(3) == "x.npz#test[3]"


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 6, 5, 1), (4, 2, 5, 3)])
def test_arrays_of_pixels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = np.resize(IMAGES, shape)
    labels = np.array([[3], [0], [1], [2]])
    path = save(tmp_path, {"train_images": images, "train_labels": labels, "val_images": images})
    source = open_npz("x", path, "train")
    assert np.array_equal(np.stack(items(source)), images)
    assert source.labels is not None
    assert source.labels.tolist() == [3, 0, 1, 2]
    assert open_npz("x", path, "val").labels is None


def test_arrays_without_a_split_name(tmp_path: Path) -> None:
    source = open_npz("x", save(tmp_path, {"images": IMAGES, "labels": [1, 0, 0, 1]}), None)
    assert len(source) == 4
    assert source.labels is not None


def test_fields_of_the_split_and_shared_ones(tmp_path: Path) -> None:
    arrays = {
        **packed("train"),
        **packed("test"),
        "test_index": np.arange(4),
        "train_index": np.arange(4) + 100,
        "overlap": np.array([0, 2, 0, 1], np.uint8),
        "index": np.zeros(4),
        "names": np.array([b"a/1", b"a/2", b"b/\xff", b"b/2"]),
        "other": np.arange(5),
        "matrix": np.zeros((4, 2)),
        "class_names": np.array(["a", "b", "c", "d"]),
    }
    source = open_npz("x", save(tmp_path, arrays), "test")
    assert sorted(source.fields) == ["index", "names", "overlap"]
    assert source.fields["index"].tolist() == [0, 1, 2, 3]
    assert [source.name(i) for i in range(4)] == ["a/1", "a/2", "b/�", "b/2"]


def test_a_split_must_be_there_or_the_only_one(tmp_path: Path) -> None:
    path = save(tmp_path, {**packed("train"), **packed("test_clean"), "val_images": IMAGES})
    with pytest.raises(DataError, match=r"several splits; it has test_clean, train, val. Write"):
        open_npz("x", path, None)
    with pytest.raises(DataError, match=r"no split dev; it has test_clean, train, val"):
        open_npz("x", path, "dev")
    assert len(open_npz("x", path, "test_clean")) == 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": IMAGES}, "holds no images: its arrays are x_train. It needs"),
        ({"test_jpeg": PACKED["jpeg"]}, "holds no images"),
        (packed("test", labels=np.arange(3)), r"4 images but labels of shape \[3\]"),
        (packed("test", jpeg=PACKED["jpeg"][:-1]), "offsets point outside"),
        (packed("test", offsets=-PACKED["offsets"]), "offsets point outside"),
        (packed("test", offsets=PACKED["offsets"][::-1]), "must not decrease"),
        (packed("test", offsets=PACKED["offsets"] * 1.0), "whole numbers"),
        (packed("test", offsets=PACKED["offsets"][:0]), "whole numbers"),
        (packed("test", offsets=PACKED["offsets"][:1]), "has no images"),
        (packed("test", jpeg=PACKED["jpeg"].astype(np.int64)), "must be uint8"),
        ({"test_images": IMAGES / 255}, r"test_images is float64 \[4, 6, 5\]"),
        ({"test_images": IMAGES[0]}, r"uint8 \[6, 5\]"),
        ({"test_images": IMAGES[:0]}, "has no images"),
        ({**packed("test"), "class_names": np.array(["a"])}, "label 1, but there are 1 classes"),
        ({**packed("test"), "class_names": np.arange(3)}, "must be text"),
        ({"test_images": np.array([1, None])}, "pickled Python objects, which are never loaded"),
        ({**packed("test"), "note": np.array([{}] * 4)}, "pickled Python objects"),
    ],
)
def test_what_is_wrong_with_an_archive(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_npz("x", save(tmp_path, arrays), "test")


def test_other_files_are_no_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for data in (b"", b"PK", b"\x80\x04N.", b"\x93NUMPY\x01\x00"):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"x\.npz is not an \.npz archive"):
            open_npz("x", path, "test")


def test_a_flipped_byte_in_the_images_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, packed("test"))
    data = bytearray(path.read_bytes())
    data[data.index(FILES[2]) + len(FILES[2]) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"could not read .*x\.npz"):
        open_npz("x", path, "test")


@given(data=st.data())
def test_any_damage_is_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = save(tmp_path_factory.getbasetemp(), packed("test"))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), len(content) // 2]))]
    path.write_bytes(content)
    try:
        assert len(open_npz("x", path, "test")) > 0
    except DataError as error:
        assert "\n" not in str(error)
