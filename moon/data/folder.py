"""Folders of image files: one folder a class, or flat; and imglists, which name files in one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moon.data.items import Source, checked_labels, shown
from moon.errors import DataError

__all__ = ["SUFFIXES", "open_folder", "open_imglist"]

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff"}
)
_HIDDEN = (".", "__MACOSX")


def open_folder(spec: str, root: Path) -> Source:
    """A folder with one folder a class, in the order of their names, or a flat folder.

    Hidden files and files that are not images by their suffix are left out. Below a class
    folder images may lie at any depth. A flat folder has no labels.

    Raises:
        DataError: no images, images beside class folders, or a class folder without images.
    """
    try:
        loose = sorted(entry.name for entry in os.scandir(root) if _is_image(entry))
        folders = sorted(entry.name for entry in os.scandir(root) if _is_folder(entry))
        classes = {name: _images_below(root / name) for name in folders}
    except OSError as error:
        raise DataError(f"could not list {error.filename or root}: {error.strerror}") from error
    full = [name for name in folders if classes[name]]
    if not full:
        if not loose:
            raise DataError(f"no images in {root}", remedy=f"Images end in {_suffixes()}")
        return Source(spec=spec, items=[root / name for name in loose], names=_plain(loose))
    if loose:
        raise DataError(
            f"{root} has both images ({_plain(loose[:1])[0]}) and folders of images ({full[0]})",
            remedy="Keep either one folder a class or a flat folder of images",
        )
    if len(full) < len(folders):
        empty = next(name for name in folders if not classes[name])
        raise DataError(
            f"the class folder {root / empty} has no images",
            remedy="Put images in, or remove it",
        )
    if len(full) > 0 and not any("/" not in name for found in classes.values() for name in found):
        raise DataError(
            f"the class folders of {root} ({shown(full, 3)}) hold no images but more folders",
            remedy=f"Give the folder whose folders are the classes, such as {root / full[0]}",
        )
    return _by_class(spec, root, classes)


def open_imglist(spec: str, listing: Path, root: Path) -> Source:
    """An imglist: one ``relative/path label`` a line; label -1 where it is unknown.

    The path ends at the first space; where what follows is no whole number, at the last.
    Lines may all be without labels.

    Raises:
        DataError: unreadable, empty, a line of another form, a path that leaves ``root``.
    """
    try:
        lines = listing.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"could not read the image list {listing}: {error}") from error
    paths: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, label = _listed(line.strip(), f"line {number} of {listing}")
        if label is not None:
            labels.append(label)
        paths.append(path)
        if labels and len(labels) < len(paths):
            raise DataError(
                f"line {number} of {listing} has {'no' if label is None else 'a'} label, "
                "unlike the lines before it",
                remedy="Write 'relative/path label' on every line, or no label on any",
            )
    if not paths:
        raise DataError(
            f"the image list {listing} names no images",
            remedy="Write a line 'relative/path label' for each",
        )
    items = [root / path for path in paths]
    if not items[0].is_file():
        raise DataError(
            f"{listing} names {paths[0]}, but there is no file {items[0]}",
            remedy="Give the folder its paths start from: LIST.txt@ROOT",
        )
    where = str(listing)
    known = checked_labels(np.array(labels), len(paths), None, where) if labels else None
    return Source(spec=spec, items=items, names=paths, labels=known)


def _listed(line: str, where: str) -> tuple[str, int | None]:
    path, _, rest = line.partition(" ")
    if rest and not _is_number(rest):
        path, _, rest = line.rpartition(" ")
        if not _is_number(rest):
            path, rest = line, ""
    path = path.strip()
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise DataError(
            f"{where} names {path}, which is outside the root folder",
            remedy="Paths in an image list are relative to its ROOT",
        )
    # Beyond any class number there could be: keeps the sum of digits within int64.
    if len(rest.strip()) > 12:
        raise DataError(f"{where} has the label {rest.strip()}, which is no class")
    return path, int(rest) if rest else None


def _is_number(text: str) -> bool:
    digits = text.strip().removeprefix("-")
    return digits.isascii() and digits.isdigit()


def _by_class(spec: str, root: Path, classes: dict[str, list[str]]) -> Source:
    names = [f"{folder}/{name}" for folder, found in classes.items() for name in found]
    counts = [len(found) for found in classes.values()]
    return Source(
        spec=spec,
        items=[root / name for name in names],
        names=_plain(names),
        labels=np.repeat(np.arange(len(counts)), counts),
        class_names=tuple(_plain(list(classes))),
    )


def _images_below(folder: Path) -> list[str]:
    return sorted(_walk(folder, "", (_identity(folder),)))


def _walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    for entry in os.scandir(folder):
        if _is_image(entry):
            yield prefix + entry.name
        elif _is_folder(entry):
            identity = _identity(Path(entry.path))
            # A link to a folder above would never end.
            if identity not in above:
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", (*above, identity))


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_image(entry: os.DirEntry[str]) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - Path is slow on a million files
    return suffix in SUFFIXES and not entry.name.startswith(_HIDDEN) and entry.is_file()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(_HIDDEN) and entry.is_dir()


def _plain(names: list[str]) -> list[str]:
    # File names that are not UTF-8 cannot be printed or put into JSON as they are.
    return [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in names]


def _suffixes() -> str:
    return ", ".join(sorted(SUFFIXES))
