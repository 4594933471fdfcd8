"""A bundle, and a Parquet file of images that are all decided otherwise."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from moon.runtime.offline import score
from tests.bundles import images, make_bundle

COUNT = 530
BROKEN = 77


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("offline") / "tiny").path


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of which one cannot be read."""
    stored = []
    for one in images(COUNT, seed=5):
        buffer = io.BytesIO()
        Image.fromarray(one.squeeze()).save(buffer, "PNG")
        stored.append(buffer.getvalue())
    stored[BROKEN] = b"no image"
    path = tmp_path_factory.mktemp("source") / "images.parquet"
    table = pyarrow.table({"image": stored, "name": [f"n{i}" for i in range(COUNT)]})
    pyarrow.parquet.write_table(table, path, row_group_size=100)
    return path


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine parts instead of one."""
    monkeypatch.setattr(score, "PART", 64)
