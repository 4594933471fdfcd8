"""From the bytes of an image file to a Pillow image in the mode the model wants.

What is done, for training and running alike: the format is recognised by content and
must be JPEG, PNG, WebP, BMP, GIF (first frame), PPM/PGM/PBM or TIFF; the size is checked
before any pixel is decoded; an EXIF orientation is applied; 16-bit grey is scaled to 8
bits; palettes and CMYK are converted; transparency is dropped (the colours under it stay).

Raises ImageError for whatever is wrong with an image, and nothing else.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from moon.errors import ImageError, TooManyPixelsError

__all__ = ["MAX_PIXELS", "decode"]

MAX_PIXELS = 64 * 1024 * 1024
FORMATS = "JPEG, PNG, WebP, BMP, GIF, PPM or TIFF"

# Pillow's own Image.open tries every format it knows and warns through a process-wide
# setting about large images; its file classes do neither.
_OPENERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "JPEG": JpegImagePlugin.jpeg_factory,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
_ENDINGS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "GIF": b";"}
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    item: str | os.PathLike[str] | bytes | Image.Image,
    mode: str,
    *,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Image.Image:
    """Decode one image.

    Args:
        item: a path, the bytes of an image file, or a Pillow image.
        mode: ``"L"`` or ``"RGB"``.
        max_pixels: largest width times height that is decoded at all.
        name: what to call the image in errors; by default its path, or "the image".

    Raises:
        ImageError: missing, empty, truncated, damaged, too large or of another format;
            of these, TooManyPixelsError for one larger than ``max_pixels``.
    """
    if isinstance(item, Image.Image):
        return _decode_pillow(item, mode, max_pixels, name or "the image")
    if isinstance(item, bytes | bytearray | memoryview):
        data, name = bytes(item), name or "the image"
    else:
        data, name = _read(Path(item)), name or str(item)
    kind = _sniff(data, name)
    try:
        image = _OPENERS[kind](io.BytesIO(data))
        _check_size(image.size, max_pixels, name)
        image.load()
        return _convert(_upright(image, kind), kind, mode, name)
    except ImageError:
        raise
    # Hostile bytes make Pillow raise nearly anything, from struct.error to KeyError.
    except Exception as error:
        raise _broken(name, kind, data, error) from error


def _decode_pillow(image: Image.Image, mode: str, max_pixels: int, name: str) -> Image.Image:
    kind = image.format or "Pillow"
    try:
        _check_size(image.size, max_pixels, name)
        image.load()
        return _convert(_upright(image, kind), kind, mode, name)
    except ImageError:
        raise
    except Exception as error:
        raise _broken(name, kind, b"", error) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"there is no file {path}", remedy="Check the path") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path} is a folder, not an image", remedy="Name an image") from error
    except OSError as error:
        raise ImageError(f"could not read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ImageError(f"not a path to an image: {error}") from error


def _sniff(data: bytes, name: str) -> str:
    if not data:
        raise ImageError(f"{name} is empty (0 bytes)", remedy="Replace it")
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return "PPM"
    raise ImageError(
        f"{name} is not an image of a format that is read here", remedy=f"Use {FORMATS}"
    )


def _check_size(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width}x{height})")
    if width * height > max_pixels:
        raise TooManyPixelsError(
            f"{name} has {width}x{height} = {width * height:,} pixels, "
            f"more than the limit of {max_pixels:,}",
            remedy="Make it smaller",
        )


def _upright(image: Image.Image, kind: str) -> Image.Image:
    # Pillow turns a TIFF upright itself while loading it.
    orientation = 1 if kind == "TIFF" else _orientation(image.info.get("exif"))
    turn = _TRANSPOSE.get(orientation)
    return image if turn is None else image.transpose(turn)


def _orientation(exif: Any) -> int:
    """The orientation tag of an EXIF block, 1 when there is none.

    Read by hand since Pillow's reader warns about every oddity of the other tags, and
    warnings cannot be silenced in one thread alone.
    """
    if not isinstance(exif, bytes):
        return 1
    tiff = exif[6:] if exif.startswith(b"Exif\0\0") else exif
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}L", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == 0x0112:
                value = struct.unpack_from(f"{order}{'L' if kind == 4 else 'H'}", tiff, entry + 8)
                return int(value[0])
    except struct.error:
        pass
    return 1


def _convert(image: Image.Image, kind: str, mode: str, name: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in {"PNG", "PPM"}):
        image = _from_16_bit(image)
    elif image.mode in {"I", "F"} or image.mode.startswith("I;"):
        raise ImageError(
            f"{name} has 32-bit pixels (mode {image.mode}), whose range is not known",
            remedy="Convert it to 8 or 16 bits",
        )
    if image.info.get("transparency") is not None:
        # With it, Pillow converts another way, and warns. The copy is for the caller's sake.
        image = image.copy()
        del image.info["transparency"]
    if image.mode in {"LAB", "HSV"}:
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _from_16_bit(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255, which turns nearly everything white.
    wide = np.asarray(image).astype(np.int64)
    return Image.fromarray(((wide.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8))


def _broken(name: str, kind: str, data: bytes, error: Exception) -> ImageError:
    if isinstance(error, MemoryError):
        return ImageError(f"{name} does not fit in memory", remedy="Make it smaller")
    if "truncated" in str(error).lower() or _ends_early(kind, data):
        return ImageError(f"{name} is truncated: the {kind} data end early", remedy="Replace it")
    reason = str(error) or type(error).__name__
    return ImageError(f"{name} is a damaged {kind} image ({reason})", remedy="Replace it")


def _ends_early(kind: str, data: bytes) -> bool:
    """Whether a file that could not be decoded lacks its end."""
    if kind == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return kind in _ENDINGS and _ENDINGS[kind] not in data[-16:]
