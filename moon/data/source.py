"""SOURCE: where images come from, written as one string.

    FOLDER                            one folder a class, or images alone (no labels)
    FILE.txt@ROOT                     an imglist: a relative path and a label a line
    FILE.npz#SPLIT                    packed encoded images, or arrays of pixels
    FOLDER#SPLIT                      idx files, plain or gzipped
    FILE.parquet                      a column of image bytes
    torchvision:NAME[@ROOT][#SPLIT]   downloaded where missing
    sklearn:digits[#SPLIT]            8x8 digits; sklearn:photos, crops of photographs

Any of them may be followed by ranges and filters, in any number and order:
``cifar10.npz#test{label in 0..7}[0:1000]``. Their grammar is in `moon.data.spec`, what
they do in `moon.data.select`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moon.data.folder import SUFFIXES, open_folder, open_imglist
from moon.data.idx import has_idx, open_idx
from moon.data.items import Item, Source
from moon.data.npz import open_npz
from moon.data.packages import open_sklearn, open_torchvision
from moon.data.parquet import open_parquet
from moon.data.select import select
from moon.data.spec import Spec, parse
from moon.errors import DataError

__all__ = ["Item", "Source", "open_source"]

_PACKAGE = re.compile(r"(torchvision|sklearn):(.*)", re.DOTALL)
_IMGLIST = re.compile(r"(.+?\.txt)(?:@(.*))?", re.IGNORECASE | re.DOTALL)
_KINDS = "Give a folder, an imglist .txt, an .npz or a .parquet file"


def open_source(spec: str | os.PathLike[str]) -> Source:
    """Open a SOURCE. Images are decoded later, one by one.

    Raises:
        UsageError: the string is not a SOURCE.
        DataError: what it names is missing, empty, damaged or badly labelled.
        MissingExtraError: the package it needs is not installed.
    """
    text = os.fspath(spec)
    parts = parse(text)
    try:
        source = _open(parts)
    except OSError as error:
        raise DataError(f"could not read {parts.base}: {error.strerror or error}") from error
    if source.names is None:
        source = replace(source, names=_Numbered(source))
    return replace(select(source, parts.selectors), spec=text)


class _Numbered(Sequence[str]):
    """Names for items that have none: ``SPEC[i]``, which is itself almost a SOURCE."""

    def __init__(self, source: Source) -> None:
        self._prefix = source.spec
        self._count = len(source.items)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return f"{self._prefix}[{index}]"


def _open(parts: Spec) -> Source:
    shown = parts.base if parts.split is None else f"{parts.base}#{parts.split}"
    if package := _PACKAGE.fullmatch(parts.base):
        name, _, root = package[2].partition("@")
        if package[1] == "sklearn":
            return open_sklearn(shown, name, parts.split)
        return open_torchvision(shown, name, _path(root) if root else None, parts.split)
    path = _path(parts.base)
    if not path.exists() and (imglist := _IMGLIST.fullmatch(parts.base)):
        path, root = _path(imglist[1]), imglist[2] or ""
        if path.is_file() and root:
            _no_split(parts)
            if not _path(root).is_dir():
                raise DataError(f"there is no folder {root} for the image list {path}")
            return open_imglist(shown, path, _path(root))
    if path.is_dir():
        if has_idx(path):
            return open_idx(shown, path, parts.split)
        _no_split(parts)
        return open_folder(shown, path)
    if not path.is_file():
        raise DataError(f"there is no file or folder {path}", remedy="Check the path")
    return _open_file(shown, path, parts)


def _open_file(shown: str, path: Path, parts: Spec) -> Source:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return open_npz(shown, path, parts.split)
    if suffix == ".parquet":
        _no_split(parts)
        return open_parquet(shown, path)
    if suffix == ".txt":
        _no_split(parts)
        return open_imglist(shown, path, path.parent)
    if suffix in SUFFIXES:
        raise DataError(f"{path} is one image, not a set", remedy="Give the folder it is in")
    raise DataError(f"{path} is no kind of image set that is read here", remedy=_KINDS)


def _no_split(parts: Spec) -> None:
    if parts.split is not None:
        raise DataError(
            f"{parts.base} has no splits, so none called {parts.split}",
            remedy=f"Leave #{parts.split} out, or name the file or folder of that split",
        )


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise DataError(f"cannot find the home folder in {text}: {error}") from error
