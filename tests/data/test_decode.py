from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from moon.data.decode import decode
from moon.errors import ImageError

PIXELS = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)
KINDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


FILES = {kind: saved(IMAGE, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_format_decodes_as_pillow_does(kind: str, mode: str) -> None:
    expected = Image.open(io.BytesIO(FILES[kind])).convert(mode)
    found = decode(FILES[kind], mode)
    assert found.mode == mode
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_paths_and_pillow_images_work_too(tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    path.write_bytes(FILES["PNG"])
    for item in (path, str(path), IMAGE, Image.open(path)):
        assert np.array_equal(np.asarray(decode(item, "RGB")), PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    option = {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": exif}
    data = saved(IMAGE, kind, **option)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(np.asarray(decode(data, "RGB")), np.asarray(expected))
    assert expected.size == ((20, 30) if orientation > 4 else (30, 20))


@given(st.binary(max_size=60))
def test_any_exif_block_is_survived(block: bytes) -> None:
    for head in (b"", b"Exif\0\0II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08\0\x01"):
        image = IMAGE.copy()
        image.info["exif"] = head + block
        assert decode(image, "RGB").size in {(30, 20), (20, 30)}


WIDE = (np.arange(600, dtype=np.uint16) * 109).reshape(20, 30)
SCALED = np.rint(WIDE / 257).astype(np.uint8)


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(WIDE), "PNG"),
        saved(Image.fromarray(WIDE), "TIFF"),
        b"P5 30 20 65535\n" + WIDE.astype(">u2").tobytes(),
        Image.fromarray(WIDE),
    ],
    ids=["PNG", "TIFF", "PGM", "Pillow"],
)
def test_16_bit_grey_is_scaled_not_clipped(data: bytes | Image.Image) -> None:
    assert np.array_equal(np.asarray(decode(data, "L")), SCALED)
    assert np.array_equal(np.asarray(decode(data, "RGB"))[..., 2], SCALED)


def test_32_bit_pixels_are_refused() -> None:
    data = saved(Image.fromarray(WIDE.astype(np.float32)), "TIFF")
    with pytest.raises(ImageError, match=r"32-bit pixels \(mode F\).*8 or 16 bits"):
        decode(data, "L")


def test_transparency_is_dropped_without_a_warning_and_the_image_left_alone() -> None:
    palette = IMAGE.quantize(16)
    plain = np.asarray(palette.convert("RGB"))
    for transparency in (3, bytes(range(16))):
        data = saved(palette, "PNG", transparency=transparency)
        assert np.array_equal(np.asarray(decode(data, "RGB")), plain)
    opened = Image.open(io.BytesIO(data))
    decode(opened, "RGB")
    assert "transparency" in opened.info
    clear = np.dstack([PIXELS, np.zeros((20, 30), np.uint8)])
    assert np.array_equal(np.asarray(decode(saved(Image.fromarray(clear), "PNG"), "RGB")), PIXELS)


@pytest.mark.parametrize("mode", ["1", "CMYK", "LAB", "HSV", "YCbCr", "LA", "PA", "RGBa"])
def test_other_modes_are_converted(mode: str) -> None:
    middle = IMAGE.convert("RGBA") if mode == "RGBa" else IMAGE
    image = Image.new("PA", (30, 20)) if mode == "PA" else middle.convert(mode)
    assert decode(image, "L").mode == "L"
    assert decode(image, "RGB").mode == "RGB"


def test_the_first_frame_of_an_animation_is_taken() -> None:
    other = Image.new("RGB", IMAGE.size)
    data = saved(IMAGE, "GIF", save_all=True, append_images=[other])
    assert np.array_equal(np.asarray(decode(data, "RGB")), np.asarray(decode(FILES["GIF"], "RGB")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_says_so(kind: str) -> None:
    half = FILES[kind][: len(FILES[kind]) // 2]
    with pytest.raises(ImageError, match=f"^cat.png is truncated: the {kind} data end early"):
        decode(half, "RGB", name="cat.png")


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_damaged_file_gives_an_image_or_an_image_error(kind: str, data: st.DataObject) -> None:
    broken = bytearray(FILES[kind])
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, min(len(broken), 400) - 1))
        broken[place] = data.draw(st.integers(0, 255))
    try:
        assert decode(bytes(broken), "RGB").mode == "RGB"
    except ImageError as error:
        assert "\n" not in str(error)


@given(st.binary(max_size=40))
def test_bytes_that_are_no_image_are_an_image_error(data: bytes) -> None:
    for head in (b"", b"P5 ", b"BM", b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"RIFF....WEBP"):
        with pytest.raises(ImageError):
            decode(head + data, "L")


def test_the_pixel_limit_comes_before_decoding() -> None:
    # Headers that claim 10^12 pixels, with little behind them: decoding would say "truncated".
    bmp = bytearray(FILES["BMP"])
    bmp[18:26] = struct.pack("<ii", 10**6, 10**6)
    png = bytearray(FILES["PNG"])
    png[16:24] = struct.pack(">II", 10**6, 10**6)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    for data in (bmp, png):
        message = r"1000000x1000000 = 1,000,000,000,000 pixels.*limit of 67,108,864"
        with pytest.raises(ImageError, match=message):
            decode(bytes(data), "L")
    with pytest.raises(ImageError, match="more than the limit of 599"):
        decode(FILES["PNG"], "L", max_pixels=599)
    assert decode(FILES["PNG"], "L", max_pixels=600).size == (30, 20)


def test_a_limit_above_pillows_own_is_no_warning() -> None:
    image = Image.new("1", (10000, 9000))
    assert decode(saved(image, "PNG"), "L", max_pixels=90_000_000).size == (10000, 9000)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (b"", "the image is empty"),
        (b"%PDF-1.4", "not an image of a format that is read here. Use JPEG, PNG, WebP"),
        (b"<svg/>", "not an image"),
        ("no/such.png", "there is no file no/such.png"),
        (".", "is a folder"),
        ("a\0b", "not a path"),
    ],
)
def test_what_is_no_image_says_why(item: str | bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode(item, "L")
