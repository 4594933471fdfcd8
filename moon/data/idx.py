"""Folders of idx files, plain or gzipped, named as MNIST's are.

    [PREFIX-]train-images-idx3-ubyte[.gz]   [PREFIX-]train-labels-idx1-ubyte[.gz]
    [PREFIX-]t10k-images-idx3-ubyte[.gz]    (or test-) the split "test"

An idx file is two zero bytes, a type (8 is uint8), the number of dimensions, each
dimension as a big-endian uint32, then the values.
"""

from __future__ import annotations

import gzip
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from moon.data.items import Source, checked_labels, shown
from moon.errors import DataError

__all__ = ["has_idx", "open_idx"]

_NAME = re.compile(
    r"(?P<prefix>.+-)?(?P<split>train|test|t10k)-(?P<kind>images|labels)[-.]idx\d-ubyte(\.gz)?"
)
_UINT8 = 8
_PIECE = 1 << 20


@dataclass(frozen=True)
class _Images:
    pixels: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


def has_idx(folder: Path) -> bool:
    """Whether a folder holds idx image files."""
    return bool(_found(folder))


def open_idx(spec: str, folder: Path, split: str | None) -> Source:
    """One split; its items are images, so they are converted to the model's size.

    Raises:
        DataError: no such split, a damaged file, or labels that do not fit the images.
    """
    found = _found(folder)
    if split is None and len(found) == 1:
        split = next(iter(found))
    if split is None or split not in found:
        what = f"no split {split}" if split else "several splits"
        raise DataError(
            f"the idx files of {folder} have {what}; there are {shown(sorted(found))}",
            remedy=f"Write {folder}#{max(found)}",
        )
    files = found[split]
    pixels = _read(files["images"])
    if (
        pixels.ndim not in (3, 4)
        or (pixels.ndim == 4 and pixels.shape[3] != 3)
        or 0 in pixels.shape
    ):
        raise DataError(
            f"{files['images']} holds values of shape {list(pixels.shape)}",
            remedy="Images are [N, height, width] or [N, height, width, 3]",
        )
    labels = None
    if "labels" in files:
        where = str(files["images"])
        labels = checked_labels(_read(files["labels"]), len(pixels), None, where)
    return Source(spec=spec, items=_Images(pixels), labels=labels)


def _found(folder: Path) -> dict[str, dict[str, Path]]:
    """From each split that has images to its files."""
    splits: dict[str, dict[str, Path]] = {}
    for name in sorted(entry.name for entry in os.scandir(folder)):
        if match := _NAME.fullmatch(name):
            last = "train" if match["split"] == "train" else "test"
            files = splits.setdefault((match["prefix"] or "") + last, {})
            files.setdefault(match["kind"], folder / name)
    return {split: files for split, files in splits.items() if "images" in files}


def _read(path: Path) -> npt.NDArray[np.uint8]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with cast(IO[bytes], opener(path, "rb")) as file:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] != _UINT8 or not head[3]:
                raise DataError(f"{path} is not an idx file of uint8 values")
            dims = struct.unpack(f">{head[3]}I", file.read(4 * head[3]))
            data = _exactly(file, int(np.prod(dims, dtype=object)))
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(
            f"could not read {path}: {error}", remedy="Copy or download it again"
        ) from error
    if data is None:
        raise DataError(
            f"{path} does not hold the {list(dims)} values that it declares",
            remedy="Copy or download it again",
        )
    return np.frombuffer(data, np.uint8).reshape(dims)


def _exactly(file: IO[bytes], count: int) -> bytearray | None:
    # In pieces: a damaged header may declare more than there is memory.
    data = bytearray()
    while len(data) <= count and (piece := file.read(min(_PIECE, count + 1 - len(data)))):
        data += piece
    return data if len(data) == count else None
