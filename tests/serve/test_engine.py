"""Which images are decoded on the event loop, and which would hold it up."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from moon.runtime.predictor import Predictor
from moon.serve.body import Encoded
from moon.serve.deadline import Deadline
from moon.serve.engine import Engine
from moon.serve.limits import Limits
from moon.serve.schema import Item
from tests.serve.conftest import encode

SMALL = np.full((32, 32, 3), 7, np.uint8)


@pytest.fixture
def engine(predictor: Predictor) -> Iterator[Engine]:
    made = Engine(predictor, threads=1, limits=Limits())
    yield made
    made.close()


def with_text() -> bytes:
    """A PNG of 2 KB with a text of a megabyte."""
    text = PngInfo()
    text.add_text("comment", "a" * 1_000_000, zip=True)
    stream = io.BytesIO()
    Image.fromarray(SMALL).save(stream, "PNG", pnginfo=text)
    assert len(stream.getvalue()) < 4096
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "at_once", "readable"),
    [
        (encode(SMALL), True, True),
        (encode(SMALL, "JPEG"), True, True),
        (encode(np.zeros((65, 64, 3), np.uint8)), False, True),
        (encode(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)), False, True),
        (encode(SMALL, "BMP"), False, True),
        (with_text(), False, None),
        (b"\x89PNG nothing", True, False),
    ],
    ids=["png", "jpeg", "pixels", "bytes", "format", "text", "broken"],
)
def test_only_tiny_images_are_decoded_at_once(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    data: bytes,
    at_once: bool,
    readable: bool | None,
) -> None:
    threads, read = [], Engine._read

    def watched(self: Engine, image: Encoded, most: int) -> Item:
        item = read(self, image, most)
        if item.error is None or "pixels" not in str(item.error):
            threads.append(threading.current_thread())
        return item

    monkeypatch.setattr(Engine, "_read", watched)
    (item,) = asyncio.run(engine.decode([Encoded(None, data)], Deadline(20)))
    assert [thread is threading.main_thread() for thread in threads] == [at_once]
    if readable is not None:
        assert (item.error is None) == readable
    if readable:
        expected = engine.predictor.bundle.preprocess.pixels(data)
        assert np.array_equal(item.pixels, expected)
