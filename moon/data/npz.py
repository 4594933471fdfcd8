"""NumPy archives: packed encoded images, or arrays of pixels, one or more splits a file.

    {split}_jpeg or {split}_png ...   uint8, the image files end to end, with
    {split}_offsets                   whole numbers [N + 1]: file i ends where file i + 1 starts
    {split}_images                    or uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3]
    {split}_labels                    optional, whole numbers [N]
    class_names                       optional, of all splits
    {split}_FIELD or FIELD            any other array [N] can be filtered by

Nothing is ever unpickled.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moon.data.items import Source, checked_labels, shown
from moon.errors import DataError

__all__ = ["open_npz"]

_CODECS = ("jpeg", "png", "webp", "gif", "bmp", "tiff")
_CLASS_NAMES = "class_names"


@dataclass(frozen=True)
class _Packed:
    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()


def open_npz(spec: str, path: Path, split: str | None) -> Source:
    """One split of an archive. The encoded bytes are held in memory, not the pixels.

    Raises:
        DataError: not such an archive, damaged, pickled, or without that split.
    """
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"{path} is not an .npz archive, or a damaged one",
            remedy="Write it with numpy.savez; a single .npy array is not one",
        )
    try:
        # Opened here, since NumPy leaves its own handle open when the archive is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return _read_split(spec, path, archive, split)
    except DataError:
        raise
    # Damage shows as anything from BadZipFile to SyntaxError, which reads an array's header.
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    if "allow_pickle" in str(error) or "pickled" in str(error):
        return DataError(
            f"{path} holds pickled Python objects, which are never loaded",
            remedy="Save plain arrays: numbers, or text of a fixed width",
        )
    return DataError(f"could not read {path}: {error}", remedy="Copy or make the file again")


def _read_split(
    spec: str, path: Path, archive: Mapping[str, npt.NDArray[Any]], split: str | None
) -> Source:
    keys = list(archive)
    layouts = _layouts(keys)
    if split is None and len(layouts) == 1:
        split = next(iter(layouts))
    if split is None or split not in layouts:
        raise _no_split(path, keys, sorted(layouts), split)
    items = _items(path, archive, split, layouts[split])
    if not len(items):
        raise DataError(f"{path}#{split} has no images")
    prefix = f"{split}_" if split else ""
    names = _class_names(path, archive, prefix)
    labels = None
    if f"{prefix}labels" in keys:
        given = archive[f"{prefix}labels"]
        labels = checked_labels(given, len(items), names, f"{path}#{split}")
    own = {f"{prefix}{part}" for part in ("labels", "offsets", "images", *_CODECS)}
    rest = [key for key in keys if key not in own]
    fields = _fields(archive, rest, prefix, len(items), [name for name in layouts if name != split])
    return Source(
        spec=spec,
        items=items,
        names=_item_names(fields),
        labels=labels,
        class_names=names,
        fields=fields,
    )


def _layouts(keys: list[str]) -> dict[str, str]:
    """From each split to how its images are stored; the split without a name is ""."""
    found: dict[str, str] = {}
    for key in keys:
        split, _, kind = key.rpartition("_")
        packed = kind in _CODECS and (f"{split}_offsets" if split else "offsets") in keys
        if packed or kind == "images":
            found.setdefault(split, kind)
    return found


def _no_split(path: Path, keys: list[str], splits: list[str], split: str | None) -> DataError:
    if not splits:
        return DataError(
            f"{path} holds no images: its arrays are {shown(keys)}",
            remedy="It needs SPLIT_images, or SPLIT_jpeg or SPLIT_png with SPLIT_offsets",
        )
    named = [name for name in splits if name]
    what = f"{path} has no split {split}" if split else f"{path} has several splits"
    return DataError(
        f"{what}; it has {shown(named)}",
        remedy=f"Write {path}#{named[0]}" if named else f"Write {path} alone",
    )


def _items(
    path: Path, archive: Mapping[str, npt.NDArray[Any]], split: str, kind: str
) -> _Packed | npt.NDArray[np.uint8]:
    prefix = f"{split}_" if split else ""
    where = f"{path}: {prefix}{kind}"
    data = archive[f"{prefix}{kind}"]
    if kind == "images":
        if data.dtype != np.uint8 or data.ndim not in (3, 4):
            raise DataError(
                f"{where} is {data.dtype} {list(data.shape)}",
                remedy="It must be uint8 [N, height, width] or [N, height, width, channels]",
            )
        return data
    offsets = archive[f"{prefix}offsets"]
    if data.dtype != np.uint8 or data.ndim != 1:
        raise DataError(f"{where} must be uint8 [bytes], got {data.dtype} {list(data.shape)}")
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or not len(offsets):
        raise DataError(f"{path}: {prefix}offsets must be whole numbers [N + 1]")
    if offsets.max() > len(data) or offsets.min() < 0:
        raise DataError(f"{path}: {prefix}offsets point outside the {len(data)} image bytes")
    offsets = offsets.astype(np.int64)
    if (np.diff(offsets) < 0).any():
        raise DataError(f"{path}: {prefix}offsets must not decrease")
    return _Packed(data, offsets)


def _class_names(
    path: Path, archive: Mapping[str, npt.NDArray[Any]], prefix: str
) -> tuple[str, ...] | None:
    for key in (f"{prefix}{_CLASS_NAMES}", _CLASS_NAMES):
        if key in archive:
            names = archive[key]
            if names.ndim != 1 or names.dtype.kind not in "US":
                raise DataError(f"{path}: {key} must be text [K], got {names.dtype}")
            return tuple(_text(names).tolist())
    return None


def _fields(
    archive: Mapping[str, npt.NDArray[Any]],
    keys: list[str],
    prefix: str,
    count: int,
    other_splits: list[str],
) -> dict[str, npt.NDArray[Any]]:
    others = tuple(f"{name}_" for name in other_splits if name)
    fields: dict[str, npt.NDArray[Any]] = {}
    # The split's own arrays go last, and so win over shared ones of the same name.
    for key in sorted(keys, key=lambda key: key.startswith(prefix) and bool(prefix)):
        own = bool(prefix) and key.startswith(prefix)
        if key.endswith(_CLASS_NAMES) or (not own and key.startswith(others)):
            continue
        values = archive[key]
        if values.shape == (count,) and values.dtype.kind in "biufUS":
            name = key[len(prefix) :] if own else key
            fields[name] = _text(values) if values.dtype.kind in "US" else values
    return fields


def _item_names(fields: Mapping[str, npt.NDArray[Any]]) -> list[str] | None:
    names = fields.get("names")
    return None if names is None or names.dtype.kind != "U" else [str(name) for name in names]


def _text(values: npt.NDArray[Any]) -> npt.NDArray[np.str_]:
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8", "replace")
    return values
