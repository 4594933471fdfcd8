"""What the tests of every room share: thread limits, real images, small image sets."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

# Before anything imports a library that reads it; torch takes its thread count from here.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from PIL import Image

# The machines that run these tests are shared: a slow example is no failure.
settings.register_profile("moon", deadline=None)
settings.load_profile("moon")


@pytest.fixture(scope="session", autouse=True)
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels of the sparse engine are compiled once a session, not into the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOON_CACHE_DIR", str(tmp_path_factory.mktemp("engine-cache")))
        patch.delenv("MOON_ENGINE_GUARD", raising=False)
        patch.delenv("MOON_ENGINE_ISA", raising=False)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real image sets for measuring, where there is one."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MOON_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real image sets in {folder} (set MOON_TEST_DATA)")
    return folder


class Encode(Protocol):
    def __call__(self, pixels: npt.NDArray[np.uint8], kind: str = "PNG") -> bytes: ...


def encode(pixels: npt.NDArray[np.uint8], kind: str = "PNG") -> bytes:
    """Pixels, uint8 [H, W] or [H, W, 3], as the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="session", name="encode")
def encode_fixture() -> Encode:
    """`encode`, for tests that would rather not import it."""
    return encode


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """Three classes (ant, bee, cow) of 4, 3 and 2 PNGs, 12x10 RGB, all different."""
    random = np.random.default_rng(0)
    root = tmp_path / "classes"
    for name, count in (("ant", 4), ("bee", 3), ("cow", 2)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            (root / name / f"{i}.png").write_bytes(encode(pixels))
    return root


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real 8x8 grey digits as PNGs, one folder a class, 20 a class."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    root = tmp_path_factory.mktemp("digits")
    for digit in range(10):
        (root / str(digit)).mkdir()
        for i in np.flatnonzero(digits.target == digit)[:20]:
            pixels = np.rint(digits.images[i] * (255 / 16)).astype(np.uint8)
            (root / str(digit) / f"{i:04d}.png").write_bytes(encode(pixels))
    return root
