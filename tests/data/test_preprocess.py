from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from moon.data.preprocess import Preprocess
from moon.errors import ImageError, UsageError

GREY = Preprocess(crop=(4, 6), mean=(0.5,), std=(0.25,))
RGB = Preprocess(crop=(8, 8), resize=10, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    found = GREY.pixels(Image.fromarray(pixels))
    assert found.shape == GREY.shape == (4, 6, 1)
    assert np.array_equal(found[..., 0], pixels)
    found[:] = 0  # the caller's own


def test_resize_keeps_the_aspect_and_crops_the_centre() -> None:
    # 20 x 40: halved to 10 x 20, then rows 1..8 and columns 6..13.
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[2:18, 12:28] = 255
    nearest = Preprocess(
        crop=(8, 8), resize=10, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="nearest"
    )
    assert (nearest.pixels(Image.fromarray(pixels)) == 255).all()
    pixels[2:4, 12:28] = 0
    found = nearest.pixels(Image.fromarray(pixels))
    assert (found[0] == 0).all()
    assert (found[1:] == 255).all()


def test_without_resize_the_aspect_is_ignored() -> None:
    pixels = np.repeat(np.array([[0, 255]], np.uint8), 2, axis=0)
    nearest = Preprocess(crop=(2, 6), mean=(0.0,), std=(1.0,), interpolation="nearest")
    expected = [[0, 0, 0, 255, 255, 255]] * 2
    assert nearest.pixels(Image.fromarray(pixels))[..., 0].tolist() == expected


def test_shrinking_is_antialiased() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    half = Preprocess(crop=(8, 8), mean=(0.0,), std=(1.0,)).pixels(Image.fromarray(stripes))
    assert abs(half.astype(int) - 127).max() <= 8


def test_torchvisions_transforms_give_the_same_pixels() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    random = np.random.default_rng(0)
    for size in ((50, 37), (37, 50), (11, 10), (13, 200), (10, 10), (31, 10)):
        image = Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))
        steps = [transforms.Resize(10), transforms.CenterCrop(8)]
        expected = np.asarray(transforms.Compose(steps)(image))
        assert np.array_equal(RGB.pixels(image), expected), size


def test_an_extreme_strip_stays_small() -> None:
    tall = Image.new("L", (1, 1_000_000), 77)
    wide = Image.new("L", (1_000_000, 1), 77)
    big = Preprocess(crop=(224, 224), resize=256, mean=(0.5,), std=(0.5,))
    for image in (tall, wide):
        found = big.pixels(image)
        assert found.shape == (224, 224, 1)
        assert (found == 77).all()


def test_arrays_must_fit_exactly() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert np.array_equal(GREY.pixels(pixels), pixels[..., None])
    assert np.array_equal(GREY.pixels(pixels[..., None]), pixels[..., None])
    for wrong in (pixels.T, pixels[None], np.zeros((4, 6, 3), np.uint8), np.uint8(3)[None]):
        with pytest.raises(ImageError, match=r"must have the shape \[4, 6, 1\].*got \[") as error:
            GREY.pixels(wrong)
        assert str(list(wrong.shape)) in str(error.value)
    with pytest.raises(ImageError, match=r"shape \[8, 8, 3\].*got \[8, 8\]"):
        RGB.pixels(np.zeros((8, 8), np.uint8))
    with pytest.raises(ImageError, match=r"must be uint8 \(0 to 255\), got float64"):
        GREY.pixels(pixels / 255)
    with pytest.raises(ImageError, match="got object"):
        GREY.pixels(np.array([["a", None]], object))


def test_normalise_is_the_formula_in_float32() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    expected = pixels.astype(np.float32) / np.float32(255)
    expected -= np.array(RGB.mean, np.float32)
    expected /= np.array(RGB.std, np.float32)
    found = RGB.normalise(pixels)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert np.array_equal(found, expected.transpose(0, 3, 1, 2))
    assert np.array_equal(found[:, :, ::-1], RGB.normalise(pixels[:, ::-1]))
    assert RGB.normalise(pixels[:0]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 8, 8, 1), (2, 3, 8, 8)])
def test_normalise_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=r"expected uint8 pixels \[N, 8, 8, 3\], got uint8"):
        RGB.normalise(np.zeros(shape, np.uint8))


@given(
    crop=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    extra=st.none() | st.integers(0, 100),
    mean=st.lists(st.floats(-1, 2), min_size=3, max_size=3),
    interpolation=st.sampled_from(["bilinear", "bicubic", "nearest"]),
)
def test_json_round_trip(
    crop: tuple[int, int], extra: int | None, mean: list[float], interpolation: Any
) -> None:
    made = Preprocess(
        crop=crop,
        resize=None if extra is None else max(crop) + extra,
        mean=tuple(mean),
        std=(0.1, 0.2, 0.3),
        interpolation=interpolation,
    )
    assert Preprocess.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": (0, 4)}, r"crop must be \[height, width\]"),
        ({"crop": (4,)}, "crop"),
        ({"crop": 4}, "crop"),
        ({"crop": (4.0, 4)}, "crop"),
        ({"crop": (True, 4)}, "crop"),
        ({"crop": (4, 10**6)}, "crop"),
        ({"resize": 5}, "resize must be a whole number from 6"),
        ({"resize": 7.5}, "resize"),
        ({"mean": (0.5, 0.5)}, r"1 value \(grey\) or 3 \(RGB\) each, got 2 and 1"),
        ({"mean": ()}, "1 value"),
        ({"mean": "a"}, "mean must be a list of finite numbers"),
        ({"mean": (float("nan"),)}, "mean must be a list of finite numbers"),
        ({"std": (0.0,)}, "std must be above 0"),
        ({"std": ("a",)}, "std must be"),
        ({"interpolation": "lanczos"}, "Use bilinear, bicubic, nearest"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    good = {
        "crop": (4, 6),
        "resize": None,
        "mean": (0.5,),
        "std": (0.5,),
        "interpolation": "nearest",
    }
    with pytest.raises(UsageError, match=message):
        Preprocess(**{**good, **change})


def test_json_with_other_fields_is_refused() -> None:
    good = GREY.to_json()
    with pytest.raises(UsageError, match="missing or unknown fields: zoom"):
        Preprocess.from_json({**good, "zoom": 1})
    with pytest.raises(UsageError, match="fields: std"):
        Preprocess.from_json({key: value for key, value in good.items() if key != "std"})
    with pytest.raises(UsageError, match="must be an object, got list"):
        Preprocess.from_json([])  # type: ignore[arg-type]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ImageError, match=r"x\.png is truncated"):
        GREY.pixels(tmp_path / "x.png")
