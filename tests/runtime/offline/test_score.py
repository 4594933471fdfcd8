"""Whole sources as tables, interrupted and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from moon.data.source import open_source
from moon.errors import DataError, ImageError, MoonError, UsageError
from moon.runtime.offline import score_source
from moon.runtime.offline.worker import Worker
from moon.runtime.predictor import Predictor
from tests.bundles import make_bundle
from tests.runtime.offline.conftest import BROKEN, COUNT

pytestmark = pytest.mark.usefixtures("small_parts")


def rows(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pyarrow.parquet.read_table(out).to_pylist()
    return found


@pytest.fixture
def whole(bundle: Path, source: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """The rows of a run that nothing interrupted."""
    score_source(bundle, str(source), tmp_path / "whole.parquet", workers=1)
    return rows(tmp_path / "whole.parquet")


def stopped_after(monkeypatch: pytest.MonkeyPatch, parts: int) -> list[int]:
    """From here on the source fails after so many parts; which parts were asked for."""
    asked: list[int] = []
    make = Worker.part

    def part(self: Worker, number: int) -> None:
        asked.append(number)
        if len(asked) > parts:
            raise DataError("the disk is gone")
        make(self, number)

    monkeypatch.setattr(Worker, "part", part)
    return asked


def test_rows_are_what_a_predictor_decides(
    bundle: Path, source: Path, whole: list[dict[str, Any]]
) -> None:
    images = open_source(source)
    decisions = Predictor.open(bundle).predict_each(images.item(i) for i in range(COUNT))
    assert [row["input"] for row in whole] == [images.name(i) for i in range(COUNT)]
    for i, (row, decision) in enumerate(zip(whole, decisions, strict=True)):
        if i == BROKEN:
            assert isinstance(decision, ImageError) and row["error"] and row["score"] is None
            continue
        assert not isinstance(decision, ImageError) and row["error"] is None
        assert row["label"] == decision.label and row["reason"] == decision.reason
        assert row["score"] == pytest.approx(decision.score, rel=1e-5)
    decided = [row["decision"] for row in whole]
    assert decided.count("accept") > 9 < decided.count("abstain") and decided.count(None) == 1


@pytest.mark.parametrize("workers", [2, 5, 40])
def test_rows_do_not_depend_on_workers(
    bundle: Path, source: Path, tmp_path: Path, whole: list[dict[str, Any]], workers: int
) -> None:
    summary = score_source(bundle, str(source), tmp_path / "s.parquet", workers=workers)
    assert rows(tmp_path / "s.parquet") == whole
    assert (summary.rows, summary.failed, summary.continued) == (COUNT, 1, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.parquet", "whole.parquet"]


def test_what_was_done_is_not_done_again(
    bundle: Path,
    source: Path,
    tmp_path: Path,
    whole: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "s.parquet"
    out.write_bytes(b"old")
    with monkeypatch.context() as context:
        asked = stopped_after(context, 4)
        with pytest.raises(DataError, match="the disk is gone"):
            score_source(bundle, str(source), out, workers=1)
    assert out.read_bytes() == b"old"
    first = set(asked[:4])
    asked = stopped_after(monkeypatch, 100)
    told: list[tuple[int, int]] = []
    said: list[str] = []
    summary = score_source(
        bundle, str(source), out, workers=2,
        progress=lambda done, total, what: told.append((done, total)), say=said.append,
    )  # fmt: skip
    assert first.isdisjoint(asked) and len(asked) == 5
    assert summary.continued == 256 and rows(out) == whole
    assert said == [f"going on: 256 of {COUNT} images were decided before"]
    assert told[0] == (256, COUNT) and told[-1] == (COUNT, COUNT) and told == sorted(told)


def test_a_table_that_was_joined_halfway_is_joined_again(
    bundle: Path,
    source: Path,
    tmp_path: Path,
    whole: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "s.parquet"
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(MoonError, match=r"could not write .*full"):
            score_source(bundle, str(source), out, workers=1)
    assert not out.exists()
    score_source(bundle, str(source), out, workers=1)
    assert rows(out) == whole


def test_a_damaged_part_is_made_again(
    bundle: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.parquet"
    with monkeypatch.context() as context:
        stopped_after(context, 3)
        with pytest.raises(DataError):
            score_source(bundle, str(source), out, workers=1)
    part = min((tmp_path / "s.parquet.parts").glob("*.part"))
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(MoonError, match=r"000000\.part was damaged, and is removed"):
        score_source(bundle, str(source), out, workers=1)
    assert score_source(bundle, str(source), out, workers=1).rows == COUNT


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"threshold": 3.0}, "threshold"),
        ({"probabilities": True}, "columns"),
        ({"source": "[:500]"}, "images, listing, source"),
    ],
)
def test_parts_of_another_table_are_not_mixed_in(
    bundle: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    what: str,
) -> None:
    out = tmp_path / "s.parquet"
    with monkeypatch.context() as context:
        stopped_after(context, 2)
        with pytest.raises(DataError):
            score_source(bundle, str(source), out, workers=1)
    spec = f"{source}{change.pop('source', '')}"
    with pytest.raises(UsageError, match=f"parts of another table: {what} differ.*--restart"):
        score_source(bundle, spec, out, **change)
    summary = score_source(bundle, spec, out, restart=True, **change)
    assert summary.continued == 0 and len(rows(out)) == summary.rows
    assert not (tmp_path / "s.parquet.parts").exists()


def test_another_model_does_not_go_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tmp_path / "model", tmp_path / "s.parquet"
    make_bundle(model)
    with monkeypatch.context() as context:
        stopped_after(context, 2)
        with pytest.raises(DataError):
            score_source(model, str(source), out, workers=1)
    make_bundle(model, seed=1, force=True)
    with pytest.raises(UsageError, match="another table: model differ"):
        score_source(model, str(source), out)


def test_images_that_changed_do_not_go_on(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    folder, out = tmp_path / "images", tmp_path / "s.parquet"
    folder.mkdir()
    for i in range(130):
        Image.new("L", (8, 8), i).save(folder / f"{i:03}.png")
    with monkeypatch.context() as context:
        stopped_after(context, 1)
        with pytest.raises(DataError):
            score_source(bundle, str(folder), out, workers=1)
    Image.new("L", (9, 9), 200).save(folder / "000.png")
    with pytest.raises(UsageError, match="another table: listing differ"):
        score_source(bundle, str(folder), out)


def test_two_do_not_write_one_table(
    bundle: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.parquet"
    make = Worker.part
    seen: list[str] = []

    def part(self: Worker, number: int) -> None:
        if not seen:
            seen.append("first")
            with pytest.raises(UsageError, match=r"another moon score is writing s\.parquet"):
                score_source(bundle, str(source), out)
            seen.append("refused")
        make(self, number)

    monkeypatch.setattr(Worker, "part", part)
    assert score_source(bundle, str(source), out, workers=1).rows == COUNT
    assert seen == ["first", "refused"]


def test_a_folder_of_somebody_elses_is_left_alone(
    bundle: Path, source: Path, tmp_path: Path
) -> None:
    parts = tmp_path / "s.parquet.parts"
    parts.mkdir()
    (parts / "photo.png").write_bytes(b"dear")
    for restart in (False, True):
        with pytest.raises(UsageError, match="exists and is not of moon score"):
            score_source(bundle, str(source), tmp_path / "s.parquet", restart=restart)
    assert (parts / "photo.png").read_bytes() == b"dear"


def test_a_marker_that_is_damaged_is_named(bundle: Path, source: Path, tmp_path: Path) -> None:
    parts = tmp_path / "s.parquet.parts"
    parts.mkdir()
    (parts / "job.json").write_text("[")
    with pytest.raises(UsageError, match=r"job\.json is damaged.*--restart"):
        score_source(bundle, str(source), tmp_path / "s.parquet")
    assert score_source(bundle, str(source), tmp_path / "s.parquet", restart=True).rows == COUNT


def test_nothing_is_left_of_what_never_began(bundle: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(MoonError, match="no backend"):
        score_source(bundle, str(source), tmp_path / "s.parquet", backend="nope")
    assert not list(tmp_path.iterdir())


SLOWLY = """
import sys, time
from moon.runtime.offline import score, worker
score.PART = 64
make = worker.Worker.part
def part(self, number):
    make(self, number)
    time.sleep(0.2)
worker.Worker.part = part
from moon.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_ended_goes_on(
    bundle: Path, source: Path, tmp_path: Path, whole: list[dict[str, Any]], end: signal.Signals
) -> None:
    out = tmp_path / "s.parquet"
    words = ["score", str(bundle), str(source), "--out", str(out), "--json", "--workers", "1"]
    command = [sys.executable, "-c", SLOWLY, *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        waiting = time.monotonic() + 60
        while len(list(tmp_path.glob("s.parquet.parts/*.part"))) < 3:
            assert process.poll() is None and time.monotonic() < waiting
            time.sleep(0.02)
        process.send_signal(end)
        _, err = process.communicate(timeout=30)
    if end == signal.SIGINT:
        assert process.returncode == 130 and "same command" in err
    assert not out.exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and "1 of 530 images could not be read" in done.stderr
    summary = json.loads(done.stdout)
    assert 192 <= summary["continued"] < COUNT and rows(out) == whole
