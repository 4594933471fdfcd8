"""Parquet files with a column of image bytes, alone or in a struct with their path."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moon.data.items import Source, checked_labels, shown
from moon.errors import DataError, ImageError

__all__ = ["open_parquet"]

_IMAGE_COLUMNS = ("image", "img", "image_bytes", "bytes", "jpeg", "png", "data")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class")
_NAME_COLUMNS = ("name", "file_name", "filename", "image_id", "path", "input")
_ROW_GROUPS_HELD = 3


def open_parquet(spec: str, path: Path) -> Source:
    """The rows of a file; image bytes are read a row group at a time, as they are needed.

    The image column is the only one of type binary, or of struct {bytes, path}, or the one
    of a usual name. Labels are the column label (or labels, fine_label, target, class):
    whole numbers, or names, numbered in their sorted order. Names of whole-number labels
    are taken from the metadata that Hugging Face data sets carry. Other columns of numbers
    and text can be filtered by.

    Raises:
        DataError: not a Parquet file, damaged, or without a column of images.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            f"reading {path} needs the package pyarrow", remedy="pip install pyarrow"
        ) from error
    try:
        file = pq.ParquetFile(path)
        count = file.metadata.num_rows
        if not count:
            raise DataError(f"{path} has no rows")
        image = _image_column(path, file.schema_arrow)
        fields, names, labels, classes = _other_columns(path, file, image)
    except DataError:
        raise
    # Damage shows as Arrow's own exceptions, and as what they meet: bad text, bad numbers.
    except Exception as error:
        raise DataError(
            f"could not read {path} as Parquet: {error}", remedy="Copy or make the file again"
        ) from error
    items = _Rows(path, file, image)
    return Source(
        spec=spec, items=items, names=names, labels=labels, class_names=classes, fields=fields
    )


class _Rows:
    """The image bytes of each row, with the last few row groups kept."""

    def __init__(self, path: Path, file: Any, column: str) -> None:
        self._path = path
        self._file = file
        self._column = column
        meta = file.metadata
        rows = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(rows)])
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> bytes:
        group = int(np.searchsorted(self._starts, index, "right")) - 1
        value = self._group(group)[index - int(self._starts[group])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise ImageError(f"row {index} of {self._path} has no image bytes")
        return bytes(data)

    def _group(self, group: int) -> Any:
        with self._lock:
            if group not in self._held:
                try:
                    table = self._file.read_row_group(group, columns=[self._column])
                except Exception as error:
                    raise DataError(f"could not read {self._path}: {error}") from error
                if len(table) != self._starts[group + 1] - self._starts[group]:
                    raise DataError(f"{self._path} is damaged: rows are missing")
                self._held[group] = table.column(self._column)
                while len(self._held) > _ROW_GROUPS_HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(group)
            return self._held[group]


def _image_column(path: Path, schema: Any) -> str:
    found = [field.name for field in schema if _is_image(field.type)]
    named = [name for name in _IMAGE_COLUMNS if name in found]
    if len(found) == 1:
        return str(found[0])
    if named:
        return named[0]
    raise DataError(
        f"{path} has {'several' if found else 'no'} columns of image bytes; "
        f"its columns are {shown(schema.names)}",
        remedy="Name the column of encoded images 'image'",
    )


def _is_image(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(part.name == "bytes" and _is_image(part.type) for part in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _other_columns(
    path: Path, file: Any, image: str
) -> tuple[
    dict[str, npt.NDArray[Any]],
    Sequence[str] | None,
    npt.NDArray[np.int64] | None,
    tuple[str, ...] | None,
]:
    schema = file.schema_arrow
    wanted = [field.name for field in schema if field.name != image and _is_plain(field.type)]
    table = file.read(columns=wanted)
    columns = {name: _values(table.column(name)) for name in wanted}
    label = next((name for name in _LABEL_COLUMNS if name in columns), None)
    names = next((columns[name] for name in _NAME_COLUMNS if name in columns), None)
    text = None if names is None else [str(name) for name in names]
    if label is None:
        return columns, text, None, None
    values = columns[label]
    if values.dtype == object:
        classes: tuple[str, ...] | None = tuple(sorted({name for name in values if name}))
        number = {name: i for i, name in enumerate(classes or ())}
        labels = np.array([number.get(name, -1) for name in values], np.int64)
    else:
        classes = _class_names(schema.metadata, label)
        labels = checked_labels(values, len(values), classes, str(path))
    return columns, text, labels, classes


def _is_plain(kind: Any) -> bool:
    import pyarrow as pa

    test = pa.types
    text = test.is_string(kind) or test.is_large_string(kind)
    return bool(text or test.is_integer(kind) or test.is_floating(kind) or test.is_boolean(kind))


def _values(column: Any) -> npt.NDArray[Any]:
    """A column as numbers, or as an object array of text; missing is -1, NaN or ""."""
    import pyarrow as pa

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return np.array([value or "" for value in column.to_pylist()], object)
    if column.null_count and not pa.types.is_floating(column.type):
        column = column.cast(pa.int64()).fill_null(-1)
    return np.asarray(column.to_numpy())


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None
