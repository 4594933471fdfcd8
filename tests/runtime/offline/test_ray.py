"""The same rows by Ray Data, also when an actor is killed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet
import pytest

from moon.errors import MissingExtraError, MoonError
from moon.runtime.offline import score_source
from tests.bundles import make_bundle
from tests.runtime.offline.conftest import COUNT

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


def test_what_to_install_is_named(
    bundle: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"--engine ray needs the package ray.*\[ray\]"):
        score_source(bundle, str(source), tmp_path / "s.parquet", engine="ray")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_rows_equal_the_local_ones(bundle: Path, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    local, other = tmp_path / "local.parquet", tmp_path / "ray.parquet"
    score_source(bundle, str(source), local)
    summary = score_source(bundle, str(source), other, engine="ray", workers=2)
    assert summary.rows == COUNT
    assert pyarrow.parquet.read_table(other).equals(pyarrow.parquet.read_table(local))


@pytest.mark.slow
def test_a_killed_actor_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    import numpy as np

    bundle = make_bundle(tmp_path / "model", size=96, channels=3).path
    pixels = np.random.default_rng(0).integers(0, 256, (6000, 96, 96, 3), np.uint8)
    np.savez(tmp_path / "many.npz", test_images=pixels)
    source = f"{tmp_path / 'many.npz'}#test"
    local, other = tmp_path / "local.parquet", tmp_path / "ray.parquet"
    score_source(bundle, source, local)
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        while not killed and not ended.is_set():
            time.sleep(0.02)
            if list(tmp_path.glob("ray.parquet.parts/.*.tmp")) or list(
                tmp_path.glob("ray.parquet.parts/*.part")
            ):
                killed.extend(actors()[:1])
        for one in killed:
            os.kill(one, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        score_source(bundle, source, other, engine="ray", workers=2)
    finally:
        ended.set()
        thread.join()
    assert killed
    assert pyarrow.parquet.read_table(other).equals(pyarrow.parquet.read_table(local))


def actors() -> list[int]:
    """Process ids of the actors that decide."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                title = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::") and b"Score" in title:
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_what_an_actor_meets_is_one_line(bundle: Path, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "s.parquet"
    with pytest.raises(MoonError, match="no backend is called nope"):
        score_source(bundle, str(source), out, engine="ray", backend="nope")
    assert not list(tmp_path.iterdir())
