from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moon.data.parquet import open_parquet
from moon.errors import DataError, ImageError
from tests.conftest import encode

FILES = [encode(np.full((3, 3), i, np.uint8)) for i in range(10)]


def write(tmp_path: Path, columns: dict[str, Any], metadata: dict[str, Any] | None = None) -> Path:
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, row_group_size=3)
    return path


def test_a_column_of_bytes_over_several_row_groups(tmp_path: Path) -> None:
    columns = {"image": FILES, "label": list(range(10)), "size": [0.5] * 10, "who": ["ann"] * 10}
    source = open_parquet("x", write(tmp_path, columns))
    order = [9, 0, 5, 4, 3, 8, 1, 2, 7, 6, 0]
    assert [source.item(i) for i in order] == [FILES[i] for i in order]
    assert source.labels is not None
    assert source.labels.tolist() == list(range(10))
    assert source.class_names is None
    assert {"size", "who"} <= set(source.fields)


def test_a_struct_of_bytes_and_path_with_class_names(tmp_path: Path) -> None:
    columns = {
        "image": [{"bytes": data, "path": None} for data in FILES],
        "fine_label": [i % 2 for i in range(10)],
    }
    names = {"info": {"features": {"fine_label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    source = open_parquet("x", write(tmp_path, columns, names))
    assert source.item(4) == FILES[4]
    assert source.class_names == ("cat", "dog")
    assert source.name(4) == "x[4]"


def test_text_labels_are_numbered_and_missing_ones_unknown(tmp_path: Path) -> None:
    columns = {
        "jpeg": FILES[:4],
        "label": ["dog", None, "cat", "dog"],
        "file_name": ["a", "b", "c", "d"],
    }
    source = open_parquet("x", write(tmp_path, columns))
    assert source.labels is not None
    assert source.labels.tolist() == [1, -1, 0, 1]
    assert source.class_names == ("cat", "dog")
    assert source.name(2) == "c"
    numbers = open_parquet("x", write(tmp_path, {"jpeg": FILES[:3], "label": [1, None, 0]}))
    assert numbers.labels is not None
    assert numbers.labels.tolist() == [1, -1, 0]


def test_the_image_column_is_found_or_asked_for(tmp_path: Path) -> None:
    two = {"image": FILES, "mask": FILES[::-1]}
    assert open_parquet("x", write(tmp_path, two)).item(0) == FILES[0]
    with pytest.raises(DataError, match="several columns of image bytes; its columns are a, b"):
        open_parquet("x", write(tmp_path, {"a": FILES, "b": FILES}))
    with pytest.raises(DataError, match="no columns of image bytes; its columns are n"):
        open_parquet("x", write(tmp_path, {"n": [1, 2]}))


def test_missing_bytes_are_an_image_error(tmp_path: Path) -> None:
    source = open_parquet("x", write(tmp_path, {"image": [FILES[0], None]}))
    with pytest.raises(ImageError, match=r"row 1 of .* has no image bytes"):
        source.item(1)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for data in (b"", b"PAR1", b"x" * 100):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"could not read .*x\.parquet as Parquet"):
            open_parquet("x", path)
    empty = {"image": pa.array([], pa.binary())}
    with pytest.raises(DataError, match="has no rows"):
        open_parquet("x", write(tmp_path, empty))
    whole = bytearray(write(tmp_path, {"image": FILES}).read_bytes())
    whole[4:60] = bytes(56)
    path.write_bytes(whole)
    with pytest.raises(DataError, match="could not read"):
        open_parquet("x", path).item(0)
