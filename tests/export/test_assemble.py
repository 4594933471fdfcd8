"""What a bundle keeps of the images that scores were fitted to, and scores that are left out."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moon.bundle import Bundle
from moon.data.fingerprint import sketch
from moon.data.source import open_source
from moon.errors import CalibrationError
from moon.export import to_bundle
from moon.export.score_errors import ScoreError, ScoreParityError
from moon.runtime.calibrate import calibrate
from moon.scores import SCORE_TABLE
from moon.trainer.checkpoint import Checkpoint

from .conftest import PREPROCESS, TEST, TRAIN, from_digits


def test_images_that_fixed_a_temperature_do_not_calibrate_it_later(
    full: Bundle, tmp_path: Path
) -> None:
    (one,) = full.fitted
    assert one.scores == ("temperature",)
    assert full.training is not None
    assert (full.training.images, one.sketch.images) == (1258, 269)
    copy = tmp_path / "copy"
    shutil.copytree(full.path, copy)
    with pytest.raises(CalibrationError, match="temperature was fitted to 269 of the 539 calib"):
        calibrate(copy, TEST, score="temperature")
    said: list[str] = []
    again = calibrate(copy, TEST, score="knn", warn=said.append)
    assert said == [
        "p-values of the score temperature promise nothing now: it was fitted to 269 of these "
        "539 images"
    ]
    assert again.fitted == full.fitted and again.training == full.training


def test_images_given_to_fit_scores_do_not_calibrate_them_later(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The run's own sketch does not know them."""
    known = dataclasses.replace(checkpoint, training=sketch(open_source(TRAIN), PREPROCESS))
    fit = f"{TEST}[0:200]"
    rest = f"{TEST}[200:539]"
    made = to_bundle(known, tmp_path / "out", carry=["knn"], fit=fit, data=rest, score="vim")
    (one,) = made.fitted
    assert (one.scores, one.sketch.images) == (("knn", "vim"), 200)
    with pytest.raises(CalibrationError, match=r"vim was fitted to 200 of the 539 .*so no promise"):
        calibrate(made.path, TEST)
    calibrate(made.path, TEST, score="ebo")  # and no warning: it was fitted to none
    same = to_bundle(known, tmp_path / "same", carry=["knn"], fit=TRAIN, data=rest)
    assert same.fitted == () and same.training == known.training


def test_an_own_models_temperature_is_known_without_training_images(
    digits_onnx: Path, tmp_path: Path
) -> None:
    made = from_digits(digits_onnx, tmp_path / "out", score="temperature")
    assert made.training is None
    assert [one.scores for one in made.fitted] == [("temperature",)]
    assert Bundle.open(made.path).fitted == made.fitted
    with pytest.raises(CalibrationError, match="temperature was fitted to 269"):
        calibrate(made.path, TEST)


@pytest.fixture
def off_by_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph's react is not its definition, and rmds has a constant too large for float32."""
    from moon.export import score_nodes

    true = score_nodes.SCORE_NODES["react"]

    def react(head: Any, fitted: Any) -> str:
        return str(true(head, {**fitted, "clip": fitted["clip"] * 0.9}))

    def rmds(head: Any, fitted: Any) -> str:
        return str(head.fitted("rmds", "centre", np.array([1e39])))

    changed = {**score_nodes.SCORE_NODES, "react": react, "rmds": rmds}
    monkeypatch.setattr(score_nodes, "SCORE_NODES", changed)


@pytest.mark.usefixtures("off_by_a_little")
def test_all_leaves_out_what_a_graph_cannot_carry(digits_onnx: Path, tmp_path: Path) -> None:
    made = from_digits(digits_onnx, tmp_path / "out", carry=["all"], fit=TRAIN)
    export = made.manifest.provenance["export"]
    assert set(export["left_out"]) == {"react", "rmds"}
    assert "differs by" in export["left_out"]["react"]
    assert "holds 1e+39, which float32 cannot" in export["left_out"]["rmds"]
    assert set(made.manifest.scores) == set(SCORE_TABLE) - {"react", "rmds"}
    assert not {"react", "rmds"} & set(export["fitted"])
    assert made.gate() is not None
    for options in ({"carry": ["all", "react"]}, {"carry": ["react"]}):
        with pytest.raises(ScoreParityError, match="score react of the graph differs") as caught:
            from_digits(digits_onnx, tmp_path / "other", fit=f"{TRAIN}[0:400]", **options)
        assert caught.value.score == "react"
    with pytest.raises(ScoreError, match=r"rmds holds 1e\+39.*Export without") as failed:
        from_digits(digits_onnx, tmp_path / "other", carry=["all"], score="rmds", fit=TRAIN)
    assert failed.value.score == "rmds"
