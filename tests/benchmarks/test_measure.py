"""benchmarks/measure.py, spread.py, compare.py."""

from __future__ import annotations

import json
import math

import numpy as np


def test_reencoding_changes_pixels_but_little(scripts):
    pixels = np.random.default_rng(0).integers(100, 150, (32, 32, 3), dtype=np.uint8)
    for image in (pixels, pixels[..., :1]):
        found = scripts["measure"].reencoded(image, 75)
        assert found.shape == image.shape and found.dtype == np.uint8
        assert 0 < np.abs(found.astype(int) - image.astype(int)).mean() < 20


def test_mean_and_spread(scripts):
    spread = scripts["spread"]
    found = spread.summary([0.8, None, 0.9])
    assert found["n"] == 2 and math.isclose(found["sd"], math.sqrt(0.005))
    assert spread.shown(found) == "85.00±7.07"
    assert spread.shown(spread.summary([0.035]), scale=1, digits=3) == "0.035"
    assert spread.shown(spread.summary([])) == "-"


def test_compare(scripts, in_process, tmp_path, capsys):
    words = ["--recipe", "digits-cnn-rigl90-moon", "--recipe", "digits-cnn-rigl90", "--seeds", "1",
             "--set", "epochs=1", "--id", "sklearn:digits#test{label in 0..7}",
             "--far", "photos=sklearn:photos", "--device", "cpu", "--out"]  # fmt: skip
    assert scripts["compare"].main([*words, str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "digits-cnn-rigl90-moon" in said and "- / - " in said
    runs = json.loads((tmp_path / "compare.json").read_text())["runs"]
    assert runs["digits-cnn-rigl90-moon"][0]["scores"]["unknown"]["far"]["auroc"] > 0
